"""What weights in bf16 cost in accuracy: bits per byte of a model on held-out texts, in both types.

    scripts/fetch-texts
    PYTHONPATH=build/release/python python benchmarks/speed/precision.py data/plays/held_out/*.txt

Each text is read by `Session.score`. The result is benchmarks/results/precision_reader.json unless
told otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import fastweights
from fastweights import Session
from record import Record, save_record

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--bytes", type=int, default=100_000, help="of each text")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "precision_reader.json"
    )
    arguments = parser.parse_args()
    rows = []
    for path in arguments.texts:
        text = path.read_bytes()[: arguments.bytes]
        row: dict[str, float | int | str] = {"text": path.name, "bytes": len(text)}
        for name, dtype in DTYPES.items():
            session = Session(fastweights.load_model(arguments.model, dtype=dtype))
            row[f"bits_per_byte_{name}"] = session.score(text)
        rows.append(row)
        print(row)
    save_record(arguments.output, Record(title="weights in bf16 and in fp32", rows=rows))


if __name__ == "__main__":
    main()
