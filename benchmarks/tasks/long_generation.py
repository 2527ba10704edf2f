"""Facts kept over a long text of the model's own: with and without learning from it, and judged.

A session reads eight facts with made-up names, each said three times, and then writes a text of
chapters, more than a hundred attention windows long. Each chapter is a passage that the model
writes freely, and a line that begins one of the facts and that the model must complete. Between
chapters it is asked for all facts by choice: the right name against the seven others, so that
guessing gives 1/8. The conditions differ in what a judge says of what was written.

    PYTHONPATH=build/release/python python benchmarks/tasks/long_generation.py

Rows are written as they come; a run that was interrupted goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import fastweights
from fastweights import Judgement, Session, fact_judge, write_judged
from fastweights.judging import Judge

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "tasks")]
from continual.facts import FACTS_PER_SET, Fact, exchange_text, fact_sets, shuffled

from record import Record, save_record
from works import read_works

RESULT = ROOT / "benchmarks" / "results" / "long_generation.json"
PASSAGE_BYTES = 400
HELD_OUT_BYTES = 4096
ASKED_EVERY = 4  # chapters

Row = dict[str, Any]


def sheet(facts: list[Fact]) -> list[fastweights.Fact]:
    """The facts as a judge takes them."""
    return [fastweights.Fact(fact.prompt, fact.answer, fact.sentence) for fact in facts]


def conditions() -> dict[str, Callable[[list[Fact], int], Judge]]:
    """Name → the judge, made of the facts and a seed."""
    return {
        "learns nothing it writes": lambda facts, seed: lambda *_: Judgement(strength=0.0),
        "learns what it writes": lambda facts, seed: lambda *_: Judgement(),
        "judged, errors not learned": lambda facts, seed: fact_judge(sheet(facts), correct=False),
        "judged and corrected": lambda facts, seed: fact_judge(sheet(facts)),
        "misled: corrected wrongly": lambda facts, seed: fact_judge(sheet(shuffled(facts, seed))),
    }


def choice_accuracy(session: Session, facts: list[Fact]) -> float:
    """Share of facts whose own name is the cheapest of all."""
    right = 0
    for fact in facts:
        asked = session.fork()
        asked.read(fact.prompt)
        bits = [asked.score(other.answer) for other in facts]
        right += facts[int(np.argmin(bits))] is fact
    return right / len(facts)


def complete(session: Session, fact: Fact, judge: Judge) -> bool:
    """Begins a fact, has the model complete it, and says whether it was right."""
    session.read(fact.prompt)
    # One byte more than the name: a judge decides where a word has ended.
    written = write_judged(
        session, judge, max_tokens=len(fact.answer) + 1, temperature=0.0, stop="."
    )
    return written[0].text.encode("utf-8", "surrogateescape")[: len(fact.answer)] == fact.answer


def run(
    session: Session, facts: list[Fact], judge: Judge, held_out: bytes, chapters: int, seed: int
) -> Row:
    """One text, and what was left of the facts as it grew."""
    order = random.Random(seed)
    session.read(exchange_text(facts, seed))
    begin = session.position
    asked = [(0, choice_accuracy(session, facts))]
    held_out_bits = [session.score(held_out)]
    completed: list[bool] = []
    turns: list[Fact] = []
    started = time.perf_counter()
    for chapter in range(chapters):
        write_judged(session, judge, max_tokens=PASSAGE_BYTES, temperature=0.8)
        turns = turns or order.sample(facts, len(facts))
        completed.append(complete(session, turns.pop(), judge))
        if (chapter + 1) % ASKED_EVERY == 0:
            asked.append((session.position - begin, choice_accuracy(session, facts)))
    held_out_bits.append(session.score(held_out))
    return {
        "bytes": session.position - begin,
        "asked": asked,
        "completed": completed,
        "held_out_bits": held_out_bits,
        "seconds": time.perf_counter() - started,
    }


def key(row: Row) -> tuple[str, bool, int]:
    return row["condition"], row["store"], row["seed"]


def earlier_rows(path: Path, chapters: int) -> list[Row]:
    if not path.exists():
        return []
    rows: list[Row] = json.loads(path.read_text())["rows"]
    return [row for row in rows if len(row["completed"]) == chapters]


def grouped(rows: list[Row]) -> dict[tuple[bool, str], list[Row]]:
    groups: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["store"], row["condition"]), []).append(row)
    return groups


def table(rows: list[Row]) -> str:
    """Means over the seeds, in Markdown."""
    lines = [
        "| exact store | condition | choice, at first | at the end | lines completed rightly "
        "| held-out play, at first | at the end |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (store, condition), group in grouped(rows).items():
        first = np.mean([row["asked"][0][1] for row in group])
        last = np.mean([row["asked"][-1][1] for row in group])
        completed = np.mean([row["completed"] for row in group])
        bits = np.mean([row["held_out_bits"] for row in group], axis=0)
        lines.append(
            f"| {'yes' if store else 'no'} | {condition} | {first:.2f} | {last:.2f} "
            f"| {completed:.2f} | {bits[0]:.3f} | {bits[1]:.3f} |"
        )
    return "\n".join(lines)


COLOURS = ["#999999", "#1b6ca8", "#e08e0b", "#5b8c5a", "#c8553d"]


def save_plot(rows: list[Row], window: int, path: Path) -> None:
    """Writes a PNG: choice over the length of the text, and lines completed, by store."""
    groups = grouped(rows)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for column, store in enumerate((False, True)):
        mine = {name: group for (with_store, name), group in groups.items() if with_store == store}
        _choice(axes[0, column], mine, window)
        _completed(axes[1, column], mine)
        axes[0, column].set_title("with the exact store" if store else "fast weights alone")
    axes[0, 0].set_ylabel("right name chosen of eight")
    axes[1, 0].set_ylabel("lines completed rightly")
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"Facts along a text that the model writes itself; mean of {seeds} seeds")
    figure.savefig(path, dpi=120)


def _choice(axes: Axes, groups: dict[str, list[Row]], window: int) -> None:
    for (name, group), colour in zip(groups.items(), COLOURS, strict=False):
        curves = np.array([row["asked"] for row in group]).mean(0)
        axes.plot(curves[:, 0] / window, curves[:, 1], color=colour, label=name, marker="o", ms=3)
    axes.axhline(1 / FACTS_PER_SET, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel(f"attention windows of {window} bytes written (dotted: guessing)")
    axes.set_ylim(-0.02, 1.04)


def _completed(axes: Axes, groups: dict[str, list[Row]]) -> None:
    for (_, group), colour in zip(groups.items(), COLOURS, strict=False):
        right = np.array([row["completed"] for row in group], dtype=float).mean(0)
        rounds = right[: len(right) // FACTS_PER_SET * FACTS_PER_SET].reshape(-1, FACTS_PER_SET)
        axes.plot(1 + np.arange(len(rounds)), rounds.mean(1), color=colour, marker="o", ms=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round: each fact is begun once")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--texts", type=Path, default=ROOT / "data" / "plays")
    parser.add_argument("--chapters", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    play = read_works(arguments.texts / "held_out")["king-lear"][20000 : 20000 + HELD_OUT_BYTES]
    model = fastweights.load_model(arguments.model)
    window = model.config.attention_window
    native = model.native()
    rows = earlier_rows(arguments.output, arguments.chapters)
    done = {key(row) for row in rows}
    plan = [
        (name, store, seed)
        for store in (False, True)
        for name in conditions()
        for seed in range(1, arguments.seeds + 1)
    ]
    title = (
        f"{FACTS_PER_SET} facts along {arguments.chapters} chapters that the model writes: choice "
        "of the right name among eight, lines completed, bits per byte of a held-out play"
    )
    for each in tqdm([each for each in plan if each not in done], unit="text"):
        name, store, seed = each
        facts = fact_sets(1, seed)[0]
        session = Session(native, seed=seed, store=store)
        judge = conditions()[name](facts, seed)
        row = run(session, facts, judge, play, arguments.chapters, seed)
        rows.append({"condition": name, "store": store, "seed": seed} | row)
        rows.sort(key=lambda row: plan.index(key(row)) if key(row) in plan else len(plan))
        save_record(arguments.output, Record(title, rows))
    print(table(rows))
    save_plot(rows, window, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
