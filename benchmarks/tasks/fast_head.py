"""What the memory at the head gains and costs: bits per byte of held-out works, time per byte.

The model that ships reads each held-out work once, from its start to its end, without the head.
Its hidden states and logits then pass through `ops.fast_head` in pieces of 1024 bytes, once for
every strength and half-life: the same arithmetic as in the model, which is checked once. Beside
them stand PPMd's figures (benchmarks/tasks/ppmd_baseline.py). Needs data/plays
(scripts/fetch-texts). Run from the project's root; with --speed it only times, and adds the
figures to those that are stored:

    python benchmarks/tasks/fast_head.py
    python benchmarks/tasks/fast_head.py --speed
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import fastweights
from fastweights import nn, ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from held_out import interval, ppmd_primed

from record import Record, machine, save_record
from works import read_works

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "fast_head.json"
PIECE = 1024
ETAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
HALF_LIVES = (4096.0, 16384.0, 65536.0)  # beside none, at the default strength
Row = dict[str, Any]


class Reading:
    """What the model makes of a work, before the head: computed once."""

    def __init__(self, model: nn.LanguageModel, text: bytes) -> None:
        self.tokens = torch.tensor(list(text))[None]
        hidden: list[Tensor] = []
        hook = model.norm.register_forward_hook(lambda _, __, output: hidden.append(output[0]))
        logits, state = [], None
        for begin in tqdm(range(0, len(text), PIECE), desc="reading", leave=False):
            y, state = model(self.tokens[:, begin : begin + PIECE], state)
            logits.append(y[0])
        hook.remove()
        self.hidden, self.logits = torch.cat(hidden)[None], torch.cat(logits)[None]

    def bits(self, eta: float, half_life: float) -> Tensor:
        """Bits of every byte but the first."""
        corrected = self.logits if eta == 0.0 else self._corrected(eta, half_life)
        log_p = corrected[0, :-1].log_softmax(-1).gather(1, self.tokens[0, 1:, None])
        return log_p[:, 0] / -math.log(2.0)

    def _corrected(self, eta: float, half_life: float) -> Tensor:
        width, vocabulary = self.hidden.shape[-1], self.logits.shape[-1]
        state = [torch.zeros(1, width, vocabulary)]
        state += [torch.zeros(1, width), torch.zeros(1, vocabulary)]
        g = -math.log(2.0) / half_life if half_life else 0.0
        pieces = []
        for begin in range(0, self.tokens.shape[1], PIECE):
            part = slice(begin, begin + PIECE)
            y, *state = ops.fast_head(
                self.hidden[:, part],
                self.logits[:, part],
                self.tokens[:, part],
                *state,
                eta=eta,
                g=g,
            )
            pieces.append(y)
        return torch.cat(pieces, 1)


def quality(folder: Path, held_out: Path) -> list[Row]:
    """Bits per byte of every work for every setting."""
    model = fastweights.load_model(folder, fast_head=False)
    ppmd = ppmd_primed()
    settings = [(eta, 0.0) for eta in ETAS] + [(0.3, half_life) for half_life in HALF_LIVES]
    rows = []
    works = read_works(held_out)
    for work, text in works.items():
        reading = Reading(model, text)
        base = reading.bits(0.0, 0.0)
        common = {"work": work, "bytes": len(base) + 1, "ppmd_primed": ppmd.get(work)}
        rows.append(common | {"eta": 0.0, "half_life": 0.0, "bits_per_byte": mean(base)})
        for eta, half_life in tqdm(settings, desc=work, leave=False):
            bits = reading.bits(eta, half_life)
            rows.append(
                common
                | {"eta": eta, "half_life": half_life, "bits_per_byte": mean(bits)}
                | {"gain": mean(base - bits), "gain_95": interval(base - bits)}
            )
            print(
                "{work:22} eta {eta:<5} half-life {half_life:<8} {bits_per_byte}".format(**rows[-1])
            )
    check_against_model(folder, works, rows)
    return rows


def mean(bits: Tensor) -> float:
    """Of the bytes, in fp64."""
    return round(bits.double().mean().item(), 4)


def check_against_model(folder: Path, works: dict[str, bytes], rows: list[Row]) -> None:
    """The last work, by a session on the model that has the head."""
    row = next(row for row in reversed(rows) if (row["eta"], row["half_life"]) == (0.3, 0.0))
    text = works[row["work"]]
    model = fastweights.load_model(folder, fast_head=True, fast_head_eta=0.3)
    bits = fastweights.Session(model, piece=PIECE).token_bits(text)
    given = mean(bits[1:])
    print(f"by a session: {row['work']} {given}")
    if abs(given - row["bits_per_byte"]) > 2e-4:
        sys.exit(f"fast_head: a session reads {row['work']} at {given}, not {row['bits_per_byte']}")


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def speed(folder: Path, held_out: Path, rounds: int) -> list[Row]:
    """Microseconds per byte of the model with and without the head, interleaved."""
    text = next(iter(read_works(held_out).values()))
    models = {on: fastweights.load_model(folder, fast_head=on).native() for on in (False, True)}
    rows: list[Row] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sessions = {on: fastweights.Session(model, piece=PIECE) for on, model in models.items()}
        best = {(on, kind): math.inf for on in models for kind in ("read", "write")}
        for _ in range(rounds):
            for on, session in sessions.items():
                read = seconds_of(partial(session.read, text[: 4 * PIECE])) / (4 * PIECE)
                write = seconds_of(partial(session.write, max_tokens=200)) / 200
                best[on, "read"] = min(best[on, "read"], read)
                best[on, "write"] = min(best[on, "write"], write)
        for (on, kind), seconds in best.items():
            rows.append(
                {"threads": threads, "fast_head": on, "call": kind}
                | {"microseconds_per_byte": round(1e6 * seconds, 2)}
            )
            print(
                "{threads} threads, head {fast_head!s:5} {call:5} {microseconds_per_byte}".format(
                    **rows[-1]
                )
            )
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Bits per byte over the strength, a line for each work, PPMd beside it."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    plain = [row for row in rows if row.get("half_life") == 0.0]
    for work in dict.fromkeys(row["work"] for row in plain):
        line = sorted((r["eta"], r["bits_per_byte"]) for r in plain if r["work"] == work)
        (drawn,) = axes.plot(*zip(*line, strict=True), marker="o", label=work)
        ppmd = next(row["ppmd_primed"] for row in plain if row["work"] == work)
        if ppmd:
            axes.axhline(ppmd, color=drawn.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="write strength η of the head (0: without it)", ylabel="bits per byte")
    axes.set_title("The memory at the head; dotted: PPMd, primed", fontsize="medium")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Gain and cost of the memory at the head")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--held-out", type=Path, default=ROOT / "data" / "plays" / "held_out")
    parser.add_argument("--speed", action="store_true", help="only time, and add to what is stored")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    stored: list[Row] = []
    if arguments.output.exists():
        stored = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
    with torch.inference_mode():
        if arguments.speed:
            rows = [row for row in stored if "work" in row]
            rows += speed(arguments.model, arguments.held_out, arguments.rounds)
        else:
            rows = quality(arguments.model, arguments.held_out)
            rows += [row for row in stored if "threads" in row]
    title = (
        "The memory at the head of the model that ships: bits per byte by strength and half-life"
    )
    save_record(arguments.output, Record(title, rows, machine()))
    draw([row for row in rows if "work" in row], arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
