"""What going back costs: time against distance, bytes against length, bytes of a fork.

A session reads Python's own standard library. Then copies of it are rolled back over distances
from one byte to everything, with several budgets of checkpoints, and get feedback over as many
bytes. Run from the project's root:

    python benchmarks/tasks/session_log.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fastweights
from fastweights import Session
from process import resident_bytes
from record import Record, save_record

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "session_log.json"
Row = dict[str, Any]


def text_of(size: int) -> bytes:
    """The first `size` bytes of the standard library's modules, by name."""
    parts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        parts.append(path.read_bytes())
        if sum(map(len, parts)) >= size:
            break
    return b"".join(parts)[:size]


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def time_of_edits(model: Any, text: bytes, budgets: list[int], repeats: int) -> list[Row]:
    """Seconds of a rollback and of feedback, for each budget and distance."""
    rows = []
    for budget in budgets:
        session = Session(model, journal_bytes=budget << 20)
        reading = timed(partial(session.read, text))
        rows.append({"kind": "read", "budget_mib": budget, "seconds": reading, "bytes": len(text)})
        distances = [d for d in (1, 100, 1000, 4000, 16000) if d < len(text)] + [len(text)]
        for distance in distances if budget else distances[-2:]:
            place = session.position - distance
            for call in ("rollback", "feedback"):
                seconds, replayed = [], [0]
                for _ in range(repeats if budget else 1):
                    fork = session.fork()

                    def note(done: int, total: int, seen: list[int] = replayed) -> None:
                        seen[0] = total

                    if call == "rollback":
                        seconds.append(timed(partial(fork.rollback, place, note)))
                    else:
                        seconds.append(timed(partial(fork.feedback, place, 0.5, progress=note)))
                rows.append(
                    {
                        "kind": call,
                        "budget_mib": budget,
                        "distance": distance,
                        "replayed": replayed[0],
                        "seconds": seconds,
                    }
                )
                print(call, budget, distance, replayed[0], f"{statistics.median(seconds):.4f} s")
    return rows


def bytes_of_lengths(model: Any, text: bytes) -> list[Row]:
    """Bytes of log, checkpoints and state file against the bytes read."""
    rows = []
    session = Session(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session.fwstate"
        for end in (size for size in (1000, 4000, 16000, 64000) if size <= len(text)):
            session.read(text[session.position : end])
            report = session.report()
            saving = timed(partial(session.save, path))
            rows.append(
                {
                    "kind": "length",
                    "bytes": end,
                    "log_bytes": report.log_bytes,
                    "checkpoints": report.checkpoints,
                    "checkpoint_bytes": report.checkpoint_bytes,
                    "file_bytes": path.stat().st_size,
                    "save_seconds": saving,
                    "load_seconds": timed(partial(Session.load, path, model)),
                }
            )
            print(rows[-1])
    before = resident_bytes()
    forks = [session.fork() for _ in range(1000)]
    each = (resident_bytes() - before) / len(forks)
    rows.append({"kind": "fork", "bytes": session.position, "bytes_per_fork": each})
    print(rows[-1])
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Time against distance, bytes against length."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for budget in sorted({row["budget_mib"] for row in rows if row["kind"] == "rollback"}):
        for call, style in (("rollback", "-"), ("feedback", ":")):
            part = [r for r in rows if r["kind"] == call and r["budget_mib"] == budget]
            left.plot(
                [row["distance"] for row in part],
                [statistics.median(row["seconds"]) for row in part],
                style,
                marker="o",
                label=f"{call}, {budget} MiB of checkpoints",
            )
    left.set(xscale="log", yscale="log", xlabel="bytes back", ylabel="seconds")
    left.legend(fontsize=7)
    part = [row for row in rows if row["kind"] == "length"]
    for field in ("log_bytes", "checkpoint_bytes", "file_bytes"):
        label = field.replace("_", " ")
        right.plot([r["bytes"] for r in part], [r[field] for r in part], marker="o", label=label)
    right.set(xscale="log", yscale="log", xlabel="bytes read", ylabel="bytes")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--bytes", type=int, default=64000, help="that the session reads")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 8, 0], help="in MiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    model = fastweights.load_model(arguments.model).native()
    text = text_of(arguments.bytes)
    rows = time_of_edits(model, text, arguments.budgets, arguments.repeats)
    rows += bytes_of_lengths(model, text)
    save_record(arguments.output, Record("Going back: what it costs", rows))
    draw(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
