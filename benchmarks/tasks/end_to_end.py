"""Learning end to end, beside the other memories and beside gradient steps on all weights.

For each held-out work: bits per byte of its first bytes as they are learned, processor time, bytes
that a session keeps, and wear: what the beginning of another work costs from there, against a
learner that has read nothing. Then how much of ΔW a low rank holds.

    PYTHONPATH=build/release/python python benchmarks/tasks/end_to_end.py

Rows are written as they come; a run that was interrupted goes on where it stood.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.nn import functional
from tqdm import tqdm

import fastweights
from fastweights import EndToEndOptions, Session
from fastweights.nn import LanguageModel, LanguageModelState

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "tasks")]
from record import Record, save_record
from works import read_works

RESULT = ROOT / "benchmarks" / "results" / "end_to_end.json"
SEGMENT = 128  # bytes of a gradient step on all weights
OTHER = 20_000  # bytes of the other work
Row = dict[str, Any]


class GradientSteps:
    """Dynamic evaluation (arXiv:1709.07432): steps on all weights of a copy of the model."""

    def __init__(self, model: LanguageModel, optimizer: str, rate: float) -> None:
        self.model = copy.deepcopy(model)
        kinds = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
        self.optimizer = kinds[optimizer](self.model.parameters(), lr=rate)
        self.state: LanguageModelState = self.model.initial_state(1)

    def bits(self, text: bytes) -> float:
        """Reads, learns after each segment, and returns the bits per byte."""
        tokens = torch.tensor(list(text)).unsqueeze(0)
        total = 0.0
        last: torch.Tensor | None = None
        for begin in range(0, tokens.shape[1], SEGMENT):
            piece = tokens[:, begin : begin + SEGMENT]
            out = self.model(piece, self.state)
            self.state = out.state.detach()
            if last is not None:
                total += float(functional.cross_entropy(last, piece[:, 0], reduction="sum"))
            rows = out.logits[0, :-1]
            loss = functional.cross_entropy(rows, piece[0, 1:])
            total += float(loss.detach()) * rows.shape[0]
            last = out.logits[:, -1].detach()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return total / torch.log(torch.tensor(2.0)).item() / (tokens.shape[1] - 1)


def session_row(session: Session, text: bytes, other: bytes) -> Row:
    """One session's figures; it goes on to the other work, a fork of it begins there."""
    fresh = float(session.fork().read_and_score(other).mean())
    begin = time.process_time()
    bits = float(session.read_and_score(text).mean())
    seconds = time.process_time() - begin
    return {
        "bits_per_byte": bits,
        "seconds": seconds,
        "state_bytes": sum(each.nbytes for each in session.state().values()),
        "other": float(session.read_and_score(other).mean()),
        "other_fresh": fresh,
    }


def steps_row(learner: GradientSteps, text: bytes, other: bytes) -> Row:
    """Those of gradient steps on all weights; the other work is read without steps."""
    fresh = float(Session(learner.model).read_and_score(other).mean())
    begin = time.process_time()
    bits = learner.bits(text)
    seconds = time.process_time() - begin
    session = Session(learner.model)
    weights = sum(each.nbytes for each in learner.model.parameters())
    return {
        "bits_per_byte": bits,
        "seconds": seconds,
        "state_bytes": weights,
        "other": float(session.read_and_score(other).mean()),
        "other_fresh": fresh,
    }


def rank_row(model: LanguageModel, session: Session, text: bytes) -> Row:
    """What the last 8 KB cost with ΔW as it was before them, whole and cut to some ranks."""
    delta = session.state()["end_to_end.delta"]
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    costs = {}
    for rank in (0, 4, 16, 64, len(values)):
        cut = (left[:, :rank] * values[:rank]) @ right[:rank]
        changed = copy.deepcopy(model)
        block: Any = changed.blocks[-1]
        layer = block.feed_forward
        with torch.no_grad():
            gate, up = cut.to(torch.float32).chunk(2)
            layer.gate.weight += gate
            layer.up.weight += up
        reader = Session(changed)
        reader.read(text[:-8192])
        costs[rank] = float(reader.read_and_score(text[-8192:]).mean())
    energy = values.square().cumsum(0) / values.square().sum()
    return {
        "bits_by_rank": costs,
        "rank_of_90_percent": int((energy < 0.9).sum()) + 1,
        "norm": float(values.square().sum().sqrt()),
    }


def variants(folder: Path) -> dict[str, Callable[[bytes, bytes], Row]]:
    """Name → what gives its row."""
    plain = fastweights.load_model(folder, fast_head=False).eval()
    head = fastweights.load_model(folder).eval()

    def session(model: LanguageModel, **options: Any) -> Callable[[bytes, bytes], Row]:
        return lambda text, other: session_row(Session(model, **options), text, other)

    def steps(optimizer: str, rate: float) -> Callable[[bytes, bytes], Row]:
        return lambda text, other: steps_row(GradientSteps(plain, optimizer, rate), text, other)

    out = {
        "blocks alone": session(plain),
        "and head": session(head),
        "and end to end": session(plain, end_to_end=True),
        "and head, end to end": session(head, end_to_end=True),
        "and store": session(plain, store=True),
        "and head, store": session(head, store=True),
        "and end to end, store": session(plain, store=True, end_to_end=True),
        "and head, end to end, store": session(head, store=True, end_to_end=True),
    }
    for rate in (0.02, 0.1):
        out[f"SGD {rate} on all weights"] = steps("SGD", rate)
    for rate in (1e-4, 5e-4):
        out[f"AdamW {rate:g} on all weights"] = steps("AdamW", rate)
    for every, rate in (
        (8, 0.3),
        (16, 0.3),
        (16, 1.0),
        (32, 0.3),
        (32, 3.0),
        (64, 1.0),
        (128, 1.0),
    ):
        options = EndToEndOptions(learning_rate=rate, every=every)
        out[f"end to end, every {every}, rate {rate:g}"] = session(plain, end_to_end=options)
    return out


def table(rows: list[Row]) -> str:
    """In Markdown."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    lines = [
        f"| learner | {' | '.join(works)} | wear | CPU s per 10 KB | bytes |",
        "|---|" + "---:|" * (len(works) + 3),
    ]
    named = dict.fromkeys(row["learner"] for row in rows if "other" in row)
    for name in named:
        mine = [row for row in rows if row["learner"] == name]
        bits = " | ".join(f"{row['bits_per_byte']:.3f}" for row in mine)
        wear = sum(row["other"] - row["other_fresh"] for row in mine) / len(mine)
        pace = sum(row["seconds"] / row["bytes"] for row in mine) / len(mine) * 10_000
        size = mine[0]["state_bytes"] / 1e6
        lines.append(f"| {name} | {bits} | {wear:+.3f} | {pace:.1f} | {size:.1f} MB |")
    return "\n".join(lines)


def save_plot(rows: list[Row], path: Path) -> None:
    """Writes a PNG: cost of the work against processor time, and against wear."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(r["learner"] for r in rows if "other" in r))
    shown = [name for name in names if ", every" not in name]
    for index, name in enumerate(shown):
        mine = [row for row in rows if row["learner"] == name]
        bits = sum(row["bits_per_byte"] for row in mine) / len(mine)
        pace = sum(row["seconds"] / row["bytes"] for row in mine) / len(mine) * 10_000
        wear = sum(row["other"] - row["other_fresh"] for row in mine) / len(mine)
        weights = "weights" in name
        style = {"marker": "X" if weights else "oDsP^v<>"[index % 8], "ms": 9, "linestyle": ""}
        colour = f"C{index % 10}"
        left.plot(pace, bits, color=colour, label=name, **style)
        right.plot(wear, bits, color=colour, **style)
    left.set_ylabel("bits per byte of held-out works as they are read")
    left.set_xlabel("processor time, seconds for 10 KB")
    left.set_xlim(0, None)
    right.set_xlabel("bits per byte that another work costs more afterwards")
    right.axvline(0, color="black", linewidth=0.6)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.suptitle("Learning end to end, other memories, and gradient steps: lower left is better")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--texts", type=Path, default=ROOT / "data" / "plays" / "held_out")
    parser.add_argument("--bytes", type=int, default=60000, help="of each work")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    works = list(read_works(arguments.texts, least=2).items())
    rows: list[Row] = []
    if arguments.output.exists():
        rows = json.loads(arguments.output.read_text())["rows"]
    done = {(row["work"], row["learner"]) for row in rows}

    def add(row: Row) -> None:
        rows.append(row)
        save_record(arguments.output, Record("Learning end to end", rows))

    learners = variants(arguments.model)
    plain = fastweights.load_model(arguments.model, fast_head=False).eval()
    with tqdm(total=len(works) * (len(learners) + 1), unit="read") as progress:
        for index, (work, whole) in enumerate(works):
            text, other = whole[: arguments.bytes], works[index - 1][1][:OTHER]
            for name, learn in learners.items():
                progress.update()
                if (work, name) in done:
                    continue
                row = {"work": work, "learner": name, "bytes": len(text)}
                row |= learn(text, other)
                add(row)
            progress.update()
            if (work, "rank") not in done:
                session = Session(plain, end_to_end=True)
                session.read(text[:-8192])
                add({"work": work, "learner": "rank"} | rank_row(plain, session, text))
    print(table(rows))
    save_plot(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
