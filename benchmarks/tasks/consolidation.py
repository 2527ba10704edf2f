"""What a consolidated model knows: bits per byte of what comes next, and of what it knew before.

A session reads the first 60 KB of a text; its model is consolidated, tried on the 16 KB behind
them. Beside the model before and after stand every share that was tried and a play that both knew
nothing of. Two learners: the memories in the blocks and at the head, and the blocks with a
feed-forward that learns end to end. Needs data/plays (scripts/fetch-texts). Run from the project's
root:

    python benchmarks/tasks/consolidation.py
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path
from typing import Any

from tqdm import tqdm

import fastweights
from fastweights import Session

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import Record, save_record
from works import read_works

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "consolidation.json"
LEARNED, TRIAL, START = 60_000, 16_000, 2048
HEAD, END_TO_END = "blocks and head", "end to end"
Row = dict[str, Any]


def texts(lear: bytes) -> dict[str, tuple[bytes, bytes]]:
    """Name → what is learned, and what comes next."""
    library = Path(sysconfig.get_path("stdlib"))
    module = (library / "argparse.py").read_bytes(), (library / "optparse.py").read_bytes()
    return {
        "king-lear": (lear[:LEARNED], lear[LEARNED : LEARNED + TRIAL]),
        "argparse.py, then optparse.py": (module[0][:LEARNED], module[1][:TRIAL]),
    }


def rows_of(
    name: str, learned: bytes, trial: bytes, other: bytes, learner: str, model: Any
) -> list[Row]:
    """The model before, and what every trial and the model that was chosen come to."""
    session = Session(model, end_to_end=learner == END_TO_END)
    session.read(learned)
    rows: list[Row] = []
    for guarded in (b"", other):
        fields = {"text": name, "learner": learner, "guarded": bool(guarded)}
        with tqdm(desc=name, leave=False) as bar:

            def show(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            result = session.consolidate(trial, guarded, progress=show)
        for kind, each in (("before", result.before), ("chosen", result.chosen)):
            start = model if kind == "before" else result.model
            row = {
                **fields,
                "kind": kind,
                **each._asdict(),
                "first_2048_bits": Session(start).score(trial[:START]),
                "other_bits": Session(start).score(other),
            }
            rows.append(row)
            print(
                "{text:30} {learner:15} guarded {guarded!s:5} {kind:6} memory {memory_share} head "
                "{head_share} feed-forward {feed_forward_share} protection {protection}: next 2 KB "
                "{first_2048_bits:.4f}, 16 KB {trial_bits:.4f}, "
                "other play {other_bits:.4f}".format(**row)
            )
        rows += [{**fields, "kind": "trial", **each._asdict()} for each in result.trials]
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--held-out", type=Path, default=ROOT / "data" / "plays" / "held_out")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    works = read_works(arguments.held_out)
    other = works["richard-iii"][20000:28000]
    rows: list[Row] = []
    for learner in (HEAD, END_TO_END):
        model = fastweights.load_model(arguments.model, fast_head=learner == HEAD)
        for name, (learned, trial) in texts(works["king-lear"]).items():
            rows += rows_of(name, learned, trial, other, learner, model)
    title = "Consolidation: bits per byte from a fresh session, before and after"
    save_record(arguments.output, Record(title, rows))


if __name__ == "__main__":
    main()
