"""Bits per byte that PPMd needs for held-out works, primed with the training works and unprimed.

A language model that does not beat the primed figure has not learned. PPMd keeps adapting while it reads
the held-out work, so it is the right peer of a model that carries its memory. Each held-out work is
encoded by a fresh coder. Needs `pip install pyppmd`. Run from the project's root:

    python benchmarks/tasks/ppmd_baseline.py --train data/plays/train --held-out data/plays/held_out
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyppmd

MEMORY = 1 << 30  # bytes of model; far more than the corpus needs, so that nothing is ever restarted
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


def read_folder(folder: Path) -> dict[str, bytes]:
    """Name → bytes of each .txt in the folder, by name."""
    works = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.txt"))}
    if not works:
        sys.exit(f"ppmd_baseline: {folder} holds no .txt; run scripts/fetch-texts first")
    return works


def machine() -> dict[str, object]:
    """What the figures were computed on (they depend on the machine only through its versions)."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "pyppmd": pyppmd.__version__,
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="PPMd's bits per byte on held-out works")
    parser.add_argument("--train", type=Path, default=Path("data/plays/train"))
    parser.add_argument("--held-out", type=Path, default=Path("data/plays/held_out"))
    parser.add_argument("--order", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ppmd_baseline.json"))
    arguments = parser.parse_args()

    train = read_folder(arguments.train)
    held_out = read_folder(arguments.held_out)
    prime = b"".join(train.values())
    samples = [
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
    result = {
        "what": "bits per byte of held-out works under PPMd",
        **machine(),
        "order": arguments.order,
        "memory_bytes": MEMORY,
        "prime_bytes": len(prime),
        "prime_works": list(train),
        "samples": samples,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
