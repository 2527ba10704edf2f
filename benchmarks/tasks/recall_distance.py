"""Facts asked again at growing distances: what each memory still knows.

A session reads eight facts with made-up names, each said three times, and then plays. At each
distance a copy of it is asked for all facts by choice, the right name against the seven others, so
that guessing gives 1/8; and what the right name costs is set against what it cost before.

    PYTHONPATH=build/release/python python benchmarks/tasks/recall_distance.py

Rows are written as they come; a run that was interrupted goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import fastweights
from fastweights import Session

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "tasks")]
from continual.facts import FACTS_PER_SET, Fact, exchange_text, fact_sets

from record import Record, save_record
from works import read_works

RESULT = ROOT / "benchmarks" / "results" / "recall_distance.json"
DISTANCES = [0, 256, 1024, 4096, 16384, 65536, 262144, 1048576]
Row = dict[str, Any]


def ask(session: Session, facts: list[Fact]) -> tuple[float, float]:
    """Share of facts whose own name is the cheapest of all; bits of the right name."""
    right, cost = 0, 0.0
    for fact in facts:
        asked = session.fork()
        asked.read(fact.prompt)
        bits = [asked.score(other.answer) * len(other.answer) for other in facts]
        own = facts.index(fact)
        right += int(np.argmin(bits)) == own
        cost += bits[own]
    return right / len(facts), cost / len(facts)


def run(session: Session, facts: list[Fact], filler: bytes, farthest: int, seed: int) -> Row:
    """One session, asked at each distance."""
    _, before = ask(session, facts)
    session.read(exchange_text(facts, seed))
    begin = session.position
    points = []
    for distance in [each for each in DISTANCES if each <= farthest]:
        session.read(filler[session.position - begin : distance])
        accuracy, bits = ask(session, facts)
        points.append({"distance": distance, "accuracy": accuracy, "bits": bits})
    return {"bits_before": before, "points": points}


def variants(folders: list[Path]) -> dict[str, tuple[Path, bool, bool]]:
    """Name → model folder, with the memory at the head, with the exact store."""
    out: dict[str, tuple[Path, bool, bool]] = {}
    for folder in folders:
        name = folder.parent.name if folder.name == "model" else folder.name
        out[f"{name}: blocks alone"] = (folder, False, False)
        out[f"{name}: blocks and head"] = (folder, True, False)
        out[f"{name}: with the exact store"] = (folder, True, True)
    return out


def curve(rows: list[Row], variant: str, key: str) -> tuple[list[int], list[float]]:
    """Distances, and the mean over seeds at each."""
    mine = [row for row in rows if row["variant"] == variant]
    distances = [point["distance"] for point in mine[0]["points"]]
    means = [float(np.mean([row["points"][i][key] for row in mine])) for i in range(len(distances))]
    return distances, means


def table(rows: list[Row]) -> str:
    """Accuracy by distance, in Markdown."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    shown = max((curve(rows, name, "accuracy")[0] for name in names), key=len)
    lines = ["| memory | " + " | ".join(f"{d:,}" for d in shown) + " |"]
    lines.append("|---|" + "---:|" * len(shown))
    for name in names:
        cells = [f"{value:.2f}" for value in curve(rows, name, "accuracy")[1]]
        cells += [""] * (len(shown) - len(cells))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_plot(rows: list[Row], path: Path) -> None:
    """Writes a PNG: choice, and bits saved, over the distance."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    colours = ["#1b6ca8", "#e08e0b", "#5b8c5a", "#c8553d", "#7b4fa3", "#3aa6a0"]
    for name, colour in zip(names, colours, strict=False):
        style: dict[str, Any] = {"color": colour, "marker": "o", "ms": 4, "label": name}
        distances, accuracy = curve(rows, name, "accuracy")
        _, bits = curve(rows, name, "bits")
        before = np.mean([row["bits_before"] for row in rows if row["variant"] == name])
        places = [max(distance, 64) for distance in distances]
        left.plot(places, accuracy, **style)
        right.plot(places, before - np.array(bits), **style)
    left.axhline(1 / FACTS_PER_SET, color="black", linewidth=0.6, linestyle=":")
    left.set_ylabel("right name chosen of eight (dotted: guessing)")
    left.set_ylim(-0.02, 1.04)
    right.axhline(0, color="black", linewidth=0.6)
    right.set_ylabel("bits that the right name costs less than before")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bytes of plays read since (first point: none)")
    left.legend(fontsize=8)
    figure.suptitle(f"Facts asked again; mean of {len({r['seed'] for r in rows})} seeds")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, nargs="+", default=[ROOT / "models" / "reader"])
    parser.add_argument("--texts", type=Path, default=ROOT / "data" / "plays" / "train")
    parser.add_argument("--farthest", type=int, default=65536, help="distance without the store")
    parser.add_argument("--farthest-store", type=int, default=DISTANCES[-1], help="and with it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    filler = b"\n".join(read_works(arguments.texts).values())
    rows: list[Row] = []
    if arguments.output.exists():
        rows = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
    done = {(row["variant"], row["seed"]) for row in rows}
    made = variants(arguments.models)
    seeds = range(1, arguments.seeds + 1)
    plan = [(name, seed) for name in made for seed in seeds if (name, seed) not in done]
    for name, seed in tqdm(plan, unit="session"):
        folder, head, store = made[name]
        model = fastweights.load_model(folder, fast_head=head)
        farthest = arguments.farthest_store if store else arguments.farthest
        session = Session(model, store=store)
        row = run(session, fact_sets(1, seed)[0], filler, farthest, seed)
        rows.append({"variant": name, "seed": seed} | row)
        title = f"Choice of the right name of {FACTS_PER_SET}, and its bits, over the distance"
        save_record(arguments.output, Record(title, rows))
    print(table(rows))
    save_plot(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
