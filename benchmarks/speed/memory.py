"""Peak memory of one forward and backward call, beyond its inputs: bytes, on standard output.

In a process of its own, so that nothing before it counts: rules.py starts one for the library and
one for each peer. A small call first brings in what is loaded once; then Linux is asked to forget
the peak so far.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from calls import forward_and_backward
from peers import PEERS, Inputs, Shape


def status(field: str) -> int:
    """A size from /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(size) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", help="fastweights, or a peer of the rule")
    parser.add_argument("rule")
    for name in ("batch", "tokens", "heads", "size", "threads"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    def peak(at: Shape) -> int:
        peer = None
        if given.contender != "fastweights":
            peer = PEERS[given.rule][given.contender](at, given.threads)
        call = forward_and_backward(given.rule, Inputs.random(at), peer)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        call()
        return status("VmHWM") - before

    peak(Shape(1, 8, 1, given.size))
    print(peak(Shape(given.batch, given.tokens, given.heads, given.size)))


if __name__ == "__main__":
    main()
