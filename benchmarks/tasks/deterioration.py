"""How learning wears knowledge away: fact sets and texts one after the other, by several learners.

An exchange is a set of eight facts, each said three times, and a passage of a play. After each
exchange every learner is asked for all facts so far, by choice: the right name against the seven
others of its set, so that guessing gives 1/8. Beside it the cost of a held-out play, which shows
what happened to the knowledge that was there before.

    PYTHONPATH=build/release/python python benchmarks/tasks/deterioration.py

Rows are written as they come; a run that was interrupted goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastweights import Session, SurpriseGate, WritePolicy

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "tasks")]
from continual.facts import Fact, exchange_text, fact_sets, shuffled
from continual.learners import (
    Carried,
    CarriedWithStore,
    Consolidated,
    ElasticWeights,
    Frozen,
    Gradient,
    InSession,
    Learner,
    LoRA,
    RandomSteps,
    Replay,
    load_reader,
)
from continual.plots import save_plot
from continual.report import table

from baselines.rwkv7 import load_rwkv7
from record import Record, save_record
from works import read_works

BASE_BYTES = 8192
PASSAGE_BYTES = 1024
GUARDED_BYTES = 4096  # of text that the model was trained on, for consolidation
RESULT = ROOT / "benchmarks" / "results" / "deterioration.json"
RWKV7 = ROOT / "benchmarks" / "baselines" / "rwkv7_reader.safetensors"

Make = Callable[[Any, bytes, int], Learner]
STEPS = 16  # on each text
POLICY = WritePolicy(surprise=SurpriseGate(0, 4, 0.5, 1), memory_norm_cap=20, head_norm_cap=200)


def learners(folder: Path) -> dict[str, Make]:
    """Name → how it is made of the model, text that the model was trained on, and a seed."""
    sgd = partial(torch.optim.SGD, lr=1.0)
    adamw = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    with_head = partial(load_reader, folder, fast_head=True)
    return {
        "frozen": lambda model, base, seed: Frozen(model),
        "attention window only": lambda model, base, seed: Carried(model, window_only=True),
        "fast weights in the blocks": lambda model, base, seed: Carried(model),
        "fast weights, blocks and head": lambda model, base, seed: Carried(with_head()),
        "fast weights and exact store": lambda model, base, seed: CarriedWithStore(with_head()),
        "fast weights under a policy": lambda model, base, seed: InSession(
            Session(with_head(), policy=POLICY)
        ),
        "fast weights, end to end": lambda model, base, seed: InSession(
            Session(model, end_to_end=True)
        ),
        "fast weights, end to end and exact store": lambda model, base, seed: InSession(
            Session(model, end_to_end=True, store=True)
        ),
        "fast weights and consolidation": lambda model, base, seed: Consolidated(
            with_head(), base[:GUARDED_BYTES]
        ),
        "RWKV-7, frozen": lambda model, base, seed: Frozen(load_rwkv7(RWKV7)),
        "RWKV-7, state carried": lambda model, base, seed: Carried(load_rwkv7(RWKV7)),
        "SGD": lambda model, base, seed: Gradient(model, sgd, STEPS),
        "AdamW": lambda model, base, seed: Gradient(model, adamw, STEPS),
        "LoRA, AdamW": lambda model, base, seed: LoRA(model, partial(adamw, lr=1e-2), STEPS),
        "AdamW, replay": lambda model, base, seed: Replay(model, adamw, STEPS, seed),
        "AdamW, EWC": lambda model, base, seed: ElasticWeights(model, adamw, STEPS, base, 300.0),
    }


def accuracy(learner: Learner, facts: list[Fact]) -> tuple[float, float]:
    """Share of facts whose own name is the cheapest of the set's; bits of the right names."""
    bits = learner.answer_bits([fact.prompt for fact in facts], [fact.answer for fact in facts])
    right = bits.argmin(1) == torch.arange(len(facts))
    return float(right.float().mean()), float(bits.diagonal().mean())


def run(
    learner: Learner, sets: list[list[Fact]], taught: list[list[Fact]], play: bytes, base: bytes
) -> dict[str, Any]:
    """One learner through all exchanges; `taught` is what the texts say."""
    matrix, costs, drift = [], [], [learner.text_bits(base)]
    started = time.perf_counter()
    learning = 0.0
    for i, facts in enumerate(taught):
        passage = play[i * PASSAGE_BYTES : (i + 1) * PASSAGE_BYTES]
        begin = time.perf_counter()
        learner.learn(exchange_text(facts, i) + b"\n\n" + passage)
        learning += time.perf_counter() - begin
        answers = [accuracy(learner, each) for each in sets]
        matrix.append([right for right, _ in answers])
        costs.append([bits for _, bits in answers])
        drift.append(learner.text_bits(base))
    row = {
        "accuracy": matrix,
        "answer_bits": costs,
        "base_bits": drift,
        "seconds_learning": learning,
        "seconds": time.perf_counter() - started,
    }
    return row | ({"accepted": learner.accepted} if isinstance(learner, Consolidated) else {})


SHUFFLED = ("AdamW", "fast weights in the blocks")  # these get a control with wrong answers
RANDOM_STEPS = "random steps as long as AdamW's"


def run_seed(
    made: dict[str, Make],
    names: list[str],
    model: Any,
    texts: dict[str, bytes],
    sets: int,
    seed: int,
    done: set[str],
) -> Iterator[dict[str, Any]]:
    """Rows of one seed, as they come: the learners, then their controls."""
    facts = fact_sets(sets, seed)
    wrong = [shuffled(each, seed) for each in facts]
    runs = [(name, made[name], facts) for name in names]
    runs += [(f"{n}, answers shuffled", made[n], wrong) for n in SHUFFLED if n in names]
    if "AdamW" in names:
        runs.append((RANDOM_STEPS, partial(random_steps, made["AdamW"]), facts))
    for label, make, taught in runs:
        if label in done:
            continue
        torch.manual_seed(seed)
        learner = make(model, texts["train"], seed)
        row = run(learner, facts, taught, texts["passages"], texts["base"])
        yield {"learner": label, "seed": seed, **row}


def random_steps(make: Make, model: Any, base: bytes, seed: int) -> Paired:
    """The control that moves as far as another learner, but at random."""
    like = make(model, base, seed)
    assert isinstance(like, Gradient)
    return Paired(like, RandomSteps(model, like, seed))


class Paired:
    """Lets one learner learn before the control that follows it, and asks the control."""

    def __init__(self, first: Learner, control: Learner) -> None:
        self.first = first
        self.answer_bits = control.answer_bits
        self.text_bits = control.text_bits
        self.follow = control.learn

    def learn(self, text: bytes) -> None:
        self.first.learn(text)
        self.follow(text)


def load_texts(folder: Path) -> dict[str, bytes]:
    """Base text and passages from held-out works, and text that the model was trained on."""
    held_out = read_works(folder / "held_out")
    train = next(iter(read_works(folder / "train").values()))
    return {
        "base": held_out["king-lear"][20000 : 20000 + BASE_BYTES],
        "passages": held_out["troilus-and-cressida"][20000:],
        "train": train[10000 : 10000 + 16 * 1024],
    }


def earlier_rows(path: Path, sets: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return [row for row in rows if len(row["accuracy"]) == sets]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--texts", type=Path, default=ROOT / "data" / "plays")
    parser.add_argument("--sets", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="learners to run; see learners()")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_reader(arguments.model)
    texts = load_texts(arguments.texts)
    made = learners(arguments.model)
    names = arguments.only or list(made)
    if unknown := set(names) - set(made):
        parser.error(f"there is no learner {sorted(unknown)[0]!r}; there are {', '.join(made)}")
    rows = earlier_rows(arguments.output, arguments.sets)
    title = (
        f"{arguments.sets} sets of eight facts, one after the other: choice of the right name "
        f"among eight, and bits per byte of a held-out play"
    )
    with tqdm(desc="runs", unit="run") as progress:
        for seed in range(1, arguments.seeds + 1):
            done = {row["learner"] for row in rows if row["seed"] == seed}
            for row in run_seed(made, names, model, texts, arguments.sets, seed, done):
                rows.append(row)
                save_record(arguments.output, Record(title, rows))
                diagonal = np.mean(np.diag(np.array(row["accuracy"])))
                progress.set_postfix_str(f"{row['learner']}: learned {diagonal:.2f}")
                progress.update()
    order = list(made)  # controls follow
    rows.sort(
        key=lambda row: order.index(row["learner"]) if row["learner"] in order else len(order)
    )
    save_record(arguments.output, Record(title, rows))
    print(table(rows))
    save_plot(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
