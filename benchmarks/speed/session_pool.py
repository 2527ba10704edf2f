"""Many sessions at once: decoding together, a first token beside a long read, reading in rows.

Sessions have read different beginnings. Together, each writes on a thread of its own in a pool;
one after the other, the same sessions write alone, with all threads. The two take turns in one
process; each session's text is compared.

usage: PYTHONPATH=build/release/python python benchmarks/speed/session_pool.py
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import fastweights
from fastweights import _C
from fastweights.nn import LanguageModel, LanguageModelConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from record import Record, save_record

TEXT = b"Now is the winter of our discontent made glorious summer by this sun of York. " * 4000
PROMPT = 300
Row = dict[str, Any]


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def models() -> dict[str, _C.LanguageModel]:
    """The model that ships, and one of 27 million random weights as in docs/speed.md."""
    torch.manual_seed(1)
    wide = LanguageModelConfig(
        width=512, layers=8, feed_forward_width=1408, attention_heads=8, memory_heads=8,
        memory_value_heads=8,
    )  # fmt: skip
    reader = ROOT / "models" / "reader"
    return {
        "reader, fp32": fastweights.load_model(reader).native(),
        "reader, bf16": fastweights.load_model(reader, dtype=torch.bfloat16).native(),
        "27 million, fp32": LanguageModel(wide).eval().native(),
        "27 million, bf16": LanguageModel(wide).to(torch.bfloat16).eval().native(),
    }


def decode(name: str, model: _C.LanguageModel, sessions: int, tokens: int, turns: int) -> Row:
    """Tokens a second of all sessions together, and one after the other."""
    pool = fastweights.SessionPool(model, memory_bytes=1 << 34, journal_bytes=0)
    lone = [fastweights.Session(model, seed=i, journal_bytes=0) for i in range(sessions)]
    for i, session in enumerate(lone):
        session.read(TEXT[i : i + PROMPT])
        pool.add(str(i), session)
    together, alone = [], []
    same = True
    with ThreadPoolExecutor(sessions) as threads:
        for turn in range(turns + 1):  # the first one warms up

            def write(i: int, seed: int = turn) -> str:
                return pool.write(str(i), max_tokens=tokens, seed=seed)

            begin = time.perf_counter()
            texts = list(threads.map(write, range(sessions)))
            middle = time.perf_counter()
            expected = [session.write(max_tokens=tokens, seed=turn) for session in lone]
            end = time.perf_counter()
            same = same and texts == expected
            together.append(sessions * tokens / (middle - begin))
            alone.append(sessions * tokens / (end - middle))
    return {
        "kind": "decode",
        "model": name,
        "sessions": sessions,
        "tokens": tokens,
        "together": statistics.median(together[1:]),
        "one_after_the_other": statistics.median(alone[1:]),
        "ratio": statistics.median(a / b for a, b in zip(together[1:], alone[1:], strict=True)),
        "mean_batch": pool.report().mean_batch,
        "same_texts": same,
        "samples": {"together": together[1:], "one_after_the_other": alone[1:]},
    }


def first_token(name: str, model: _C.LanguageModel, piece: int, turns: int) -> Row:
    """Seconds until a session has written a token, while another one reads a long text."""
    pool = fastweights.SessionPool(model, piece=piece, journal_bytes=0)
    for each in ("reads", "writes"):
        pool.create(each)
    pool.read("writes", TEXT[:PROMPT])

    def write() -> object:
        return pool.write("writes", max_tokens=1)

    alone = [seconds(write) for _ in range(turns)]
    enough = threading.Event()
    begun = threading.Event()

    def on_piece(done: int, _: int) -> bool:
        if done >= 2 * piece:
            begun.set()
        return not enough.is_set()

    def read() -> None:
        with contextlib.suppress(fastweights.Cancelled):
            pool.read("reads", TEXT * 100, progress=on_piece)

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    beside = []
    for turn in range(turns):
        time.sleep(0.013 * (turn % 7))  # at any moment of a piece
        beside.append(seconds(write))
    enough.set()
    reader.join()
    return {
        "kind": "first_token",
        "model": name,
        "piece": piece,
        "alone": statistics.median(alone),
        "beside_a_read": statistics.median(beside),
        "worst_beside_a_read": max(beside),
        "samples": {"alone": alone, "beside_a_read": beside},
    }


def read_rows(name: str, model: _C.LanguageModel, rows: int, length: int, turns: int) -> Row:
    """Pieces of several sessions as rows of one forward call, and one by one."""
    tokens = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        many, one = model.initial_state(rows), model.initial_state(1)
        outputs = [model.forward(tokens[i : i + 1], one)[0][0] for i in range(rows)]
        same = torch.equal(model.forward(tokens, many)[0], torch.stack(outputs))
        together, alone = [], []
        for _ in range(turns):
            together.append(seconds(lambda: model.forward(tokens, many)))
            alone.append(
                seconds(lambda: [model.forward(tokens[i : i + 1], one) for i in range(rows)])
            )
    return {
        "kind": "read_rows",
        "model": name,
        "rows": rows,
        "length": length,
        "same_bits": same,
        "ratio": statistics.median(a / b for a, b in zip(alone, together, strict=True)),
        "samples": {"together": together, "one_by_one": alone},
    }


def draw(record: Record, path: Path) -> None:
    """Tokens a second against the number of sessions, for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record.rows if row["kind"] == "decode"]
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, all_axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3))
    for axes, name in zip(all_axes, names, strict=True):
        own = [row for row in rows if row["model"] == name]
        ticks = [str(row["sessions"]) for row in own]
        axes.plot(ticks, [row["together"] for row in own], "o-", label="together")
        axes.plot(ticks, [row["one_after_the_other"] for row in own], "s--", label="one by one")
        axes.set(title=name, xlabel="sessions", ylim=(0, None))
    all_axes[0].set_ylabel("tokens a second, all sessions")
    all_axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, default=results / "session_pool.json")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    turns = arguments.turns
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print({key: value for key, value in row.items() if key != "samples"}, flush=True)

    for name, model in models().items():
        for sessions, tokens in ((1, 200), (8, 100), (64, 50)):
            add(decode(name, model, sessions, tokens, turns))
    reader = models()["reader, fp32"]
    for piece in (1024, 128):
        add(first_token("reader, fp32", reader, piece, 4 * turns))
    for count, length in ((8, 8), (8, 64), (8, 256), (4, 1024)):
        add(read_rows("reader, fp32", reader, count, length, turns))
    record = Record(f"many sessions at once, {torch.get_num_threads()} threads", rows)
    save_record(arguments.output, record)
    draw(record, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
