"""What the exact store gains and costs, beside a model that was never trained with one.

Four measurements with the model that ships; each is stored beside the others, and the plot shows
what there is:

- `works`: bits per byte of each held-out work, read from its start to its end: the model alone,
  with the longest match, with the nearest neighbours, with both; the same behind the memory at the
  head (`ops.fast_head`). PPMd's figures (benchmarks/tasks/ppmd_baseline.py) stand beside them.
- `repeats`: passages of 192 bytes that come again after 256 … 1,000,000 bytes of other text.
- `earlier`: each work again, by stores that read a million bytes of other plays before, or
  nothing, with and without `recency`.
- `speed`: time per byte of reading and of predicting one byte, by how much was read.

Needs data/plays (scripts/fetch-texts). Run from the project's root:

    python benchmarks/tasks/exact_store.py works repeats earlier speed
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import fastweights
from fastweights import ExactStore, nn, ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from held_out import interval, ppmd_primed

from record import Record, machine, save_record
from works import read_works

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "exact_store.json"
PIECE = 1024
ETA = 0.3  # of the memory at the head
PASSAGE = 192
PASSAGES = 8  # for each distance
DISTANCES = (256, 1024, 4096, 16384, 65536, 262144, 1_000_000)
SPEED_STEP = 16384
SPEED_BYTES = 131072
EARLIER_BYTES = 1_000_000  # of other plays, that a store has read before
RECENCIES = (0.0, 0.5)
Row = dict[str, Any]

ALL_KEYS = 16 << 20  # bytes: a work's keys all stay
DEFAULT_KEYS = 4 << 20  # the last 64,512 stay

# Name → whether the memory at the head is there, longest match, nearest neighbours.
VARIANTS = {
    "model": (False, False, False),
    "+ match": (False, True, False),
    "+ neighbours": (False, False, True),
    "+ both": (False, True, True),
    "head": (True, False, False),
    "head + match": (True, True, False),
    "head + neighbours": (True, False, True),
    "head + both": (True, True, True),
}


class Piece(NamedTuple):
    """A piece of a text, and what predicted each of its bytes."""

    tokens: Tensor  # int64 [T]
    hidden: Tensor  # fp32 [T, width]
    logits: Tensor  # fp32 [T, vocabulary]
    corrected: Tensor  # the logits behind the memory at the head


def read_pieces(model: nn.LanguageModel, text: bytes, with_head: bool) -> Iterator[Piece]:
    """Reads a text piece by piece with the model, and with the memory at its head."""
    width, vocabulary = model.config.width, model.config.vocabulary_size
    seen: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda _, __, output: seen.append(output[0].float()))
    last = tuple(torch.zeros(1, size) for size in (width, vocabulary, vocabulary))
    head = [torch.zeros(1, width, vocabulary), torch.zeros(1, width), torch.zeros(1, vocabulary)]
    state = None
    all_tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    for tokens in tqdm(torch.split(all_tokens, PIECE), desc="reading", leave=False):
        logits, state = model(tokens[None], state)
        hidden = seen.pop()
        corrected = logits
        if with_head:
            corrected, *head = ops.fast_head(
                hidden[None], logits, tokens[None], *head, eta=ETA, g=0.0
            )
        rows = [
            torch.cat([before, after])
            for before, after in zip(last, (hidden, logits[0], corrected[0]), strict=True)
        ]
        yield Piece(tokens, *(each[:-1].contiguous() for each in rows))
        last = tuple(each[-1:] for each in rows)
    hook.remove()


def bits_of(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Bits that each token cost."""
    return log_p.gather(1, tokens[:, None])[:, 0].double() / -math.log(2.0)


class Reader:
    """One variant on its way through a text."""

    def __init__(
        self,
        name: str,
        config: nn.LanguageModelConfig,
        neighbour_bytes: int,
        recency: float = 0.5,
    ) -> None:
        self._head, match, neighbours = VARIANTS[name]
        self.store: ExactStore | None = None
        if match or neighbours:
            self.store = ExactStore(
                config.width,
                config.vocabulary_size,
                text_bytes=(32 << 20) * match,
                neighbour_bytes=neighbour_bytes * neighbours,
                recency=recency,
            )
        self.bits: list[Tensor] = []

    def read(self, piece: Piece) -> None:
        """Reads a piece and keeps the bits of its bytes."""
        logits = piece.corrected if self._head else piece.logits
        if self.store is None:
            log_p = logits.log_softmax(1)
        else:
            log_p = self.store.read(piece.tokens, piece.hidden, logits)
        self.bits.append(bits_of(log_p, piece.tokens))

    def with_its_store(self) -> Reader:
        """One that has read the same, and keeps the bits of what it reads from here on."""
        reader = copy.copy(self)
        reader.store, reader.bits = copy.copy(self.store), []
        return reader


def read_all(
    model: nn.LanguageModel, text: bytes, names: list[str], neighbour_bytes: int
) -> dict[str, Reader]:
    """Reads a text with several variants at once: the model runs once."""
    readers = {name: Reader(name, model.config, neighbour_bytes) for name in names}
    for piece in read_pieces(model, text, any(VARIANTS[name][0] for name in names)):
        for reader in readers.values():
            reader.read(piece)
    return readers


def works(model: nn.LanguageModel, data: Path) -> list[Row]:
    """Bits per byte of each held-out work and variant."""
    ppmd = ppmd_primed()
    rows = []
    for work, text in read_works(data / "held_out").items():
        readers = read_all(model, text, list(VARIANTS), ALL_KEYS)
        bits = {name: torch.cat(reader.bits) for name, reader in readers.items()}
        for name, reader in readers.items():
            store = reader.store
            row: Row = {
                "kind": "work",
                "work": work,
                "bytes": len(bits[name]),
                "variant": name,
                "bits_per_byte": round(bits[name].mean().item(), 4),
                "gain_interval": interval(bits["model"] - bits[name]),
                "store_bytes_per_byte": round(store.nbytes / len(store), 1) if store else 0.0,
                "ppmd_primed": ppmd.get(work),
            }
            rows.append(row)
            print("{work:22} {variant:18} {bits_per_byte:.4f}".format(**row))
    return rows


def earlier(model: nn.LanguageModel, data: Path) -> list[Row]:
    """Bits per byte of each held-out work by stores that read other plays before, or nothing.

    All keys stay. The model starts anew with each text.
    """
    other = b"".join(read_works(data / "train").values())[:EARLIER_BYTES]
    readers = {
        (read, recency): Reader("+ both", model.config, 1 << 30, recency)
        for recency in RECENCIES
        for read in (0, len(other))
    }
    for piece in read_pieces(model, other, with_head=False):
        for (read, _), reader in readers.items():
            if read:
                reader.read(piece)
    rows = []
    for work, text in read_works(data / "held_out").items():
        copies = {key: reader.with_its_store() for key, reader in readers.items()}
        for piece in read_pieces(model, text, with_head=False):
            for reader in copies.values():
                reader.read(piece)
        for (read, recency), reader in copies.items():
            row: Row = {
                "kind": "earlier",
                "work": work,
                "recency": recency,
                "bytes_before": read,
                "bits_per_byte": round(torch.cat(reader.bits).mean().item(), 4),
            }
            rows.append(row)
            print("{work:22} {recency} {bytes_before:8} {bits_per_byte}".format(**row))
    return rows


class Repeat(NamedTuple):
    """A passage and where it stands, first and again, in the text that is read."""

    distance: int  # between the end of the first and the beginning of the second
    first: int
    again: int


def with_repeats(filler: bytes) -> tuple[bytes, list[Repeat]]:
    """A text in which passages of it come again at the distances, and where they stand."""
    insertions: list[tuple[int, int]] = []  # place in the filler, beginning of the passage in it
    for number, distance in enumerate(DISTANCES):
        for i in range(PASSAGES):
            begin = 2048 + (i * len(DISTANCES) + number) * (PASSAGE + 8)
            if distance <= 4096:  # these come again before the others are all read
                begin = 80_000 + (i * 3 + number) * 5000
            insertions.append((begin + PASSAGE + distance, begin))
    insertions.sort()
    text, repeats, done = bytearray(), [], 0
    place_of: dict[int, int] = {}
    begins = sorted(begin for _, begin in insertions)
    for place, begin in insertions:
        for other in begins:
            if done <= other < place:
                place_of[other] = len(text) + other - done
        text += filler[done:place]
        done = place
        first = place_of[begin]
        repeats.append(Repeat(len(text) - first - PASSAGE, first, len(text)))
        text += filler[begin : begin + PASSAGE]
    return bytes(text), repeats


def repeats(model: nn.LanguageModel, data: Path) -> list[Row]:
    """Bits per byte of passages on the first and the second reading."""
    plays = (read_works(data / folder).values() for folder in ("held_out", "train"))
    filler = b"".join(play for each in plays for play in each)
    text, places = with_repeats(filler)
    names = ["model", "+ match", "+ both"]
    rows = []
    for name, reader in read_all(model, text, names, DEFAULT_KEYS).items():
        bits = torch.cat(reader.bits)
        for distance in DISTANCES:
            mine = [p for p in places if distance <= p.distance < 1.5 * distance + 4 * PASSAGE]
            first, again = (
                [bits[begin : begin + PASSAGE].mean().item() for begin in begins]
                for begins in ([p.first for p in mine], [p.again for p in mine])
            )
            row: Row = {
                "kind": "repeat",
                "variant": name,
                "distance": distance,
                "first": round(sum(first) / len(first), 4),
                "again": round(sum(again) / len(again), 4),
                "samples": [round(x, 3) for x in again],
            }
            rows.append(row)
            print("{variant:18} after {distance:8} {first:.3f} -> {again:.3f}".format(**row))
    return rows


def speed(model: nn.LanguageModel, data: Path) -> list[Row]:
    """Microseconds per byte by bytes read: the model, the store, the store byte by byte."""
    text = b"".join(read_works(data / "train").values())[:SPEED_BYTES]
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    reader = Reader("+ both", model.config, ALL_KEYS)
    assert reader.store is not None
    rows: list[Row] = []
    state, spent = None, {"model": 0.0, "store": 0.0}
    seen: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    for begin in range(0, len(tokens), PIECE):
        part = tokens[begin : begin + PIECE]
        start = time.perf_counter()
        logits, state = model(part[None], state)
        middle = time.perf_counter()
        hidden = seen.pop()
        # What predicted a byte stands one place earlier; for the time it takes all are alike.
        reader.store.read(part, hidden, logits[0])
        spent["model"] += middle - start
        spent["store"] += time.perf_counter() - middle
        if (begin + PIECE) % SPEED_STEP == 0:
            start = time.perf_counter()
            for i in range(20):
                reader.store.predict(hidden[i], logits[0, i])
            step = (time.perf_counter() - start) / 20
            rows.append(
                {
                    "kind": "speed",
                    "bytes_read": begin + PIECE,
                    "threads": torch.get_num_threads(),
                    "model_us": round(spent["model"] / SPEED_STEP * 1e6, 2),
                    "store_us": round(spent["store"] / SPEED_STEP * 1e6, 2),
                    "predict_us": round(step * 1e6, 1),
                    "store_bytes_per_byte": round(reader.store.nbytes / (begin + PIECE), 1),
                }
            )
            spent = dict.fromkeys(spent, 0.0)
            print(rows[-1])
    hook.remove()
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """The three measurements, as far as there are rows."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    found = [row for row in rows if row["kind"] == "work"]
    names = sorted({row["work"] for row in found})
    for i, variant in enumerate([*VARIANTS, "PPMd, primed"] if found else []):
        if variant == "PPMd, primed":
            values = [next(r["ppmd_primed"] for r in found if r["work"] == n) for n in names]
        else:
            values = [r["bits_per_byte"] for r in found if r["variant"] == variant]
        left.bar([x + i * 0.09 for x in range(len(names))], values, 0.09, label=variant)
    left.set_xticks([x + 0.36 for x in range(len(names))], names)
    left.set(ylabel="bits per byte", title="Held-out works", ylim=(1.4, None))
    left.legend(fontsize=7)
    found = [row for row in rows if row["kind"] == "repeat"]
    for variant in dict.fromkeys(row["variant"] for row in found):
        mine = [row for row in found if row["variant"] == variant]
        distances = [row["distance"] for row in mine]
        middle.plot(distances, [row["again"] for row in mine], marker="o", label=variant)
    middle.set(xscale="log", xlabel="bytes since the first reading", ylabel="bits per byte")
    middle.set(title=f"A passage of {PASSAGE} bytes, read again", ylim=(0, None))
    if found:
        middle.legend(fontsize=7)
    found = [row for row in rows if row["kind"] == "speed"]
    for field, label in (("model_us", "model, reading"), ("store_us", "store, reading")):
        right.plot(
            [row["bytes_read"] / 1000 for row in found], [row[field] for row in found], label=label
        )
    right.set(xlabel="kilobytes read", ylabel="µs per byte", title="Time", ylim=(0, None))
    if found:
        right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Gains and costs of the exact store")
    measurements = {"works": works, "repeats": repeats, "earlier": earlier, "speed": speed}
    kinds = {"works": "work", "repeats": "repeat", "earlier": "earlier", "speed": "speed"}
    parser.add_argument("measurements", nargs="+", choices=list(measurements))
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "plays")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = fastweights.load_model(arguments.model, fast_head=False).eval()
    for name in arguments.measurements:
        with torch.inference_mode():
            rows = measurements[name](model, arguments.data)
        others: list[Row] = []
        if arguments.output.exists():
            others = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
        rows += [row for row in others if row["kind"] != kinds[name]]
        title = "The exact store: bits per byte, recall against distance, time"
        save_record(arguments.output, Record(title, rows, machine()))
        plot(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
