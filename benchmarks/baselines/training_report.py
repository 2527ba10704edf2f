"""RWKV-7 beside models/reader: bits per byte of held-out works over the bytes read in training.

Prints the tables of docs/deterioration.md and draws training_rwkv7.png from training_rwkv7.json,
training_reader_first.json and training_reader.json.

    python benchmarks/baselines/training_report.py
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[1] / "results"
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def curve(rows: list[Row]) -> list[tuple[float, float]]:
    """Bytes read in training, and mean bits per byte of the held-out works' beginnings."""
    bytes_at = {row["step"]: row["bytes"] for row in rows if "bytes" in row}
    return [
        (bytes_at[row["step"]], row["mean"])
        for row in rows
        if row["event"] == "evaluation" and row["step"] in bytes_at
    ]


def at(points: list[tuple[float, float]], place: float) -> float | None:
    """A curve at some number of bytes, on the line between its points; None outside it."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= place <= x1:
            return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    return None


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel="bytes read in training", ylabel="bits per byte, first 32 KiB of each work")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} MB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder: Path = parser.parse_args().results
    rwkv7, first = (read(folder / f"training_{n}.json") for n in ("rwkv7", "reader_first"))
    reader = read(folder / "training_reader.json")
    read_in_all = first[0]["bytes_read"] + reader[0]["bytes_read"]
    print("| model | parameters | bytes read | king-lear | richard-iii | troilus-and-cressida |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, summary, count in (
        ("RWKV-7", rwkv7[0], rwkv7[0]["bytes_read"]),
        ("models/reader, first run", first[0], first[0]["bytes_read"]),
        ("models/reader", reader[0], read_in_all),
    ):
        bits = [summary["held_out"][work] for work in rwkv7[0]["held_out"]]
        values = [each["memory_carried"] if isinstance(each, dict) else each for each in bits]
        cells = " | ".join(f"{value:.3f}" for value in values)
        print(f"| {name} | {summary['parameters']:,} | {count:,} | {cells} |")
    curves = {"RWKV-7": curve(rwkv7), "models/reader, first run": curve(first)}
    print("\n| bytes read | RWKV-7 | models/reader, first run |\n|---:|---:|---:|")
    for place, mean in curves["RWKV-7"]:
        other = at(curves["models/reader, first run"], place)
        print(f"| {place:,} | {mean:.3f} | {'' if other is None else f'{other:.3f}'} |")
    draw(curves, folder / "training_rwkv7.png")


if __name__ == "__main__":
    main()
