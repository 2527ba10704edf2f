"""Writing with tokens guessed ahead, against writing one by one: the same text, in less time.

Two bounds, where every guess is right and where every guess is wrong; and what look-up in the
session's own text gains after 60,000 bytes of a play: on free text, and on a passage that the
session has read and, with its exact store, tells again.

usage: PYTHONPATH=build/release/python python benchmarks/speed/speculative_decoding.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastweights
from fastweights import _C, ExactStoreOptions, Session
from fastweights.nn import LanguageModel, LanguageModelConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from record import Record, save_record

RESULT = ROOT / "benchmarks" / "results" / "speculative_decoding.json"
AHEAD = [2, 4, 8, 16]
READ = 60_000
Row = dict[str, Any]
Guess = Callable[[bytes, int], bytes]


def wide_model(dtype: torch.dtype) -> _C.LanguageModel:
    """27 million random weights, as in docs/speed.md."""
    torch.manual_seed(1)
    config = LanguageModelConfig(
        width=512, layers=8, feed_forward_width=1408, attention_heads=8, memory_heads=8,
        memory_value_heads=8,
    )  # fmt: skip
    return LanguageModel(config).to(dtype).eval().native()


def oracle(text: bytes, wrong: bool) -> Guess:
    """Guesses what is going to be written, or what is not."""
    told = 0

    def guess(read: bytes, most: int) -> bytes:
        nonlocal told
        told += len(read)
        right = text[told : told + most]
        return bytes(byte ^ 1 for byte in right) if wrong else right

    return guess


def measure(
    name: str,
    model: str,
    session: Session,
    options: dict[str, Any],
    turns: int,
    guess: Callable[[bytes], Guess] | None = None,
) -> list[Row]:
    """A row for each number of tokens ahead; plain writing takes turns with all of them."""
    tokens = options["max_tokens"]
    text = session.fork().write(**options).encode("utf-8", "surrogateescape")
    samples: dict[int, list[float]] = {ahead: [] for ahead in [0, *AHEAD]}
    same = True
    for _ in range(turns):
        for ahead, taken in samples.items():
            ahead_options: dict[str, Any] = {"ahead": ahead}
            if ahead and guess:
                ahead_options["guess"] = guess(text)
            fork = session.fork()
            begin = time.perf_counter()
            written = fork.write(**options, **ahead_options)
            taken.append(time.perf_counter() - begin)
            same = same and written.encode("utf-8", "surrogateescape") == text
    return [
        {
            "case": name,
            "model": model,
            "ahead": ahead,
            "tokens_per_second": tokens / statistics.median(taken),
            "ratio": statistics.median(a / b for a, b in zip(samples[0], taken, strict=True)),
            "same_text": same,
            "seconds": taken,
        }
        for ahead, taken in samples.items()
    ]


def table(rows: list[Row]) -> str:
    """Ratios in Markdown."""
    lines = [
        "| | model | one by one, tokens/s | " + " | ".join(f"{n} ahead" for n in AHEAD) + " |",
        "|---|---|---:|" + "---:|" * len(AHEAD),
    ]
    for key in dict.fromkeys((row["case"], row["model"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["model"]) == key]
        cells = [f"{row['ratio']:.2f}" for row in mine[1:]]
        speed = f"{mine[0]['tokens_per_second']:.0f}"
        lines.append(f"| {key[0]} | {key[1]} | {speed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=ROOT / "data/plays/held_out/king-lear.txt")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if not arguments.text.exists():
        sys.exit(f"speculative_decoding: no {arguments.text}; run scripts/fetch-texts first")
    torch.set_num_threads(arguments.threads)
    text = arguments.text.read_bytes()[:READ]
    folder = ROOT / "models" / "reader"
    models: dict[str, _C.LanguageModel] = {
        "reader, fp32": fastweights.load_model(folder).native(),
        "reader, bf16": fastweights.load_model(folder, dtype=torch.bfloat16).native(),
        "27 million, fp32": wide_model(torch.float32),
        "27 million, bf16": wide_model(torch.bfloat16),
    }
    rows: list[Row] = []
    cases = tqdm(total=2 * len(models) + 3, unit="case")

    def run(*case: Any) -> None:
        rows.extend(measure(*case))
        cases.update()

    options: dict[str, Any] = {"max_tokens": arguments.tokens, "seed": 1}
    for name, model in models.items():
        session = Session(model, journal_bytes=0)
        session.read(text[:300])
        for wrong in (False, True):

            def guess(written: bytes, wrong: bool = wrong) -> Guess:
                return oracle(written, wrong)

            case = "every guess wrong" if wrong else "every guess right"
            run(case, name, session, options, arguments.turns, guess)
    plain = Session(models["reader, fp32"], journal_bytes=0)
    plain.read(text)
    free = {**options, "temperature": 0.7}
    run("look-up, free text", "reader, fp32", plain, free, arguments.turns)
    greedy = {**options, "temperature": 0.0}
    run("look-up, the likeliest text", "reader, fp32", plain, greedy, arguments.turns)
    store = Session(models["reader, fp32"], journal_bytes=0, store=ExactStoreOptions())
    store.read(text)
    store.read(text[10_000:10_200])
    run("look-up, a passage told again", "reader with store", store, greedy, arguments.turns)
    cases.close()
    save_record(
        arguments.output, Record(f"tokens guessed ahead, {arguments.threads} threads", rows)
    )
    print(table(rows))


if __name__ == "__main__":
    main()
