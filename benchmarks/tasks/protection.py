"""Protected keys: what a consolidated model knew of one play, after a session read another.

A session reads the beginning of a play and is consolidated; sessions of the new model, with and
without protection of the first play's keys, then read another play. What does the first play's next
part cost before and after, and what does the other play cost?

    PYTHONPATH=build/release/python python benchmarks/tasks/protection.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastweights
from fastweights import Protection, Session, protect_keys

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "tasks")]
from record import Record, save_record
from works import read_works

RESULT = ROOT / "benchmarks" / "results" / "protection.json"
LEARNED = 60_000  # bytes of the first play that are consolidated
NEXT = 8_192  # bytes of it that are asked
SHARES = (0.3, 0.6, 0.9)
Row = dict[str, Any]


def measure(model: Any, protection: Protection | None, first: bytes, other: bytes) -> Row:
    """One session's figures."""
    session = Session(model, protection=protection)
    asked = first[LEARNED : LEARNED + NEXT]
    before = session.score(asked)
    cost = float(session.read_and_score(other).mean())
    free = protection.free_ranks() if protection else None
    return {
        "before": before,
        "other": cost,
        "after": session.score(asked),
        "free_rank": float(free.float().mean()) if free is not None else None,
        "refused_writes": session.report().refused_writes,
    }


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [
        "| first play, other | protection | free directions | before | other play | after |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        free = "all" if row["free_rank"] is None else f"{row['free_rank']:.0f} of {row['keys']}"
        lines.append(
            f"| {row['first']}, {row['second']} | {row['protection']} | {free} | "
            f"{row['before']:.3f} | {row['other']:.3f} | {row['after']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--texts", type=Path, default=ROOT / "data" / "plays")
    parser.add_argument("--bytes", type=int, default=60000, help="of the other play")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    works = list(read_works(arguments.texts / "held_out", least=2).items())
    guarded = next(iter(read_works(arguments.texts / "train").values()))[10_000:18_192]
    # Without the memory at the head, which is not protected.
    model = fastweights.load_model(arguments.model, fast_head=False)
    rows: list[Row] = []
    with tqdm(total=len(works) * (1 + len(SHARES)), unit="session") as progress:
        for index, (name, first) in enumerate(works):
            second, other = works[index - 1]
            session = Session(model)
            session.read(first[:LEARNED])
            trial = first[LEARNED - NEXT : LEARNED]
            try:
                learned = session.consolidate(trial, guarded, tolerance=0.05, head=False).model
            except fastweights.Error as error:  # it gains nothing there
                progress.write(f"{name}: {error}")
                progress.update(1 + len(SHARES))
                continue
            kinds: dict[str, Protection | None] = {"none": None}
            for share in SHARES:
                text = first[LEARNED - 16_384 : LEARNED]
                kinds[f"share {share}"] = protect_keys(learned, text, share=share, most=56)
            for kind, protection in kinds.items():
                row = {"first": name, "second": second, "protection": kind, "keys": 64}
                rows.append(row | measure(learned, protection, first, other[: arguments.bytes]))
                save_record(arguments.output, Record("Protected keys", rows))
                progress.update()
    print(table(rows))


if __name__ == "__main__":
    main()
