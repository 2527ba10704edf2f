"""Bits per byte that PPMd needs for held-out works, primed with the training works and unprimed.

A language model that does not beat the primed figure has not learned. PPMd keeps adapting while it
reads the held-out work, so it is the right peer of a model that carries its memory. Each held-out
work is encoded by a fresh coder. Needs `pip install pyppmd`. Run from the project's root:

    python benchmarks/tasks/ppmd_baseline.py --train data/plays/train --held-out data/plays/held_out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyppmd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import Record, machine, save_record
from works import read_works

MEMORY = 1 << 30  # bytes; more than the corpus needs, so that the model is never restarted
RESULT = Path(__file__).resolve().parents[1] / "results" / "ppmd_baseline.json"
VARIANTS: dict[str, Callable[[int], object]] = {
    "PPMd variant H": lambda order: pyppmd.Ppmd7Encoder(order, MEMORY),
    "PPMd variant I": lambda order: pyppmd.Ppmd8Encoder(order, MEMORY),
}


def coded_bits(new_encoder: Callable[[int], object], order: int, prime: bytes, work: bytes) -> int:
    """Bits that `work` takes after `prime` in one stream: the difference of two coded lengths."""

    def coded_length(data: bytes) -> int:
        encoder = new_encoder(order)
        return len(encoder.encode(data)) + len(encoder.flush())  # type: ignore[attr-defined]

    return 8 * (coded_length(prime + work) - (coded_length(prime) if prime else 0))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="PPMd's bits per byte on held-out works")
    parser.add_argument("--train", type=Path, default=Path("data/plays/train"))
    parser.add_argument("--held-out", type=Path, default=Path("data/plays/held_out"))
    parser.add_argument("--order", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()

    train = read_works(arguments.train)
    held_out = read_works(arguments.held_out)
    prime = b"".join(train.values())
    samples: list[dict[str, Any]] = [
        {
            "work": name,
            "bytes": len(work),
            "coder": coder,
            "primed": round(coded_bits(make, arguments.order, prime, work) / len(work), 4),
            "unprimed": round(coded_bits(make, arguments.order, b"", work) / len(work), 4),
        }
        for coder, make in VARIANTS.items()
        for name, work in held_out.items()
    ]
    for sample in samples:
        print("{coder}  {work:24} primed {primed:.3f}  unprimed {unprimed:.3f}".format(**sample))
    title = (
        f"Bits per byte of held-out works under PPMd of order {arguments.order}, "
        f"primed with {len(train)} works ({len(prime)} bytes) and unprimed"
    )
    save_record(
        arguments.output, Record(title, samples, machine() | {"pyppmd": pyppmd.__version__})
    )


if __name__ == "__main__":
    main()
