"""Stores the figures of a finished training run, draws its curves and prints the table of the docs.

    python benchmarks/tasks/training_report.py --run build/train/reader

Reads log.jsonl and summary.json of the run and ppmd_baseline.json, writes training_reader.json and
training_reader.png to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import Record, save_record

RESULTS = Path(__file__).resolve().parents[1] / "results"
Row = dict[str, Any]


def read_log(run: Path) -> list[Row]:
    """Read all records of the run, in order."""
    with (run / "log.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def ppmd_primed(path: Path) -> dict[str, float]:
    """Work → the best primed figure of PPMd."""
    best: dict[str, float] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        best[row["work"]] = min(row["primed"], best.get(row["work"], row["primed"]))
    return best


def markdown_table(works: dict[str, Row], ppmd: dict[str, float]) -> str:
    """Bits per byte of each held-out work, read from its start to its end."""
    lines = ["| held-out work | bytes | memory carried | attention window only | PPMd, primed |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, row in works.items():
        cells = [name, f"{row['bytes']:,}"]
        cells += [f"{row['memory_carried']:.3f}", f"{row['attention_only']:.3f}"]
        cells += [f"{ppmd[name]:.3f}" if name in ppmd else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(log: list[Row], path: Path) -> None:
    """Plot the training loss and the held-out loss over the bytes read."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    train = [row for row in log if row["event"] == "train"]
    bytes_at = {row["step"]: row["bytes"] / 1e6 for row in train}
    axes.plot(
        [row["bytes"] / 1e6 for row in train],
        [row["bits_per_byte"] for row in train],
        color="0.7",
        linewidth=0.8,
        label="training text (with planted repeats)",
    )
    held_out = [row for row in log if row["event"] == "evaluation" and row["step"] in bytes_at]
    for work in held_out[0]["held_out"] if held_out else []:
        axes.plot(
            [bytes_at[row["step"]] for row in held_out],
            [row["held_out"][work] for row in held_out],
            marker=".",
            label=f"{work}, first {held_out[0]['first_bytes'] // 1024} KiB",
        )
    axes.set(xlabel="million bytes read", ylabel="bits per byte", ylim=(1.5, 3.5))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Store and draw the figures of a training run")
    parser.add_argument("--run", type=Path, default=Path("build/train/reader"))
    parser.add_argument("--ppmd", type=Path, default=RESULTS / "ppmd_baseline.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "training_reader.json")
    arguments = parser.parse_args()

    log = read_log(arguments.run)
    summary = json.loads((arguments.run / "summary.json").read_text(encoding="utf-8"))
    ppmd = ppmd_primed(arguments.ppmd)
    for name, row in summary["held_out"].items():
        row["ppmd_primed"] = ppmd.get(name)
    title = "Training of the model that ships: its summary, then every record of its log"
    save_record(arguments.output, Record(title, [{"event": "summary", **summary}, *log]))
    draw(log, arguments.output.with_suffix(".png"))
    print(
        f"{summary['steps']} steps, {summary['bytes_read']:,} bytes read, "
        f"{summary['seconds'] / 60:.0f} minutes, seed {summary['recipe']['seed']}\n"
    )
    print(markdown_table(summary["held_out"], ppmd))


if __name__ == "__main__":
    main()
