"""Trains RWKV-7 on plays the way models/reader was trained, its state carried over segments.

    python benchmarks/baselines/train_rwkv7.py --output build/train/rwkv7 --bytes 4e6 --seed 1

Each row reads its own work from front to back; a work, drawn from a shuffled deck, starts with an
empty state, and so does a row that is reset. Passages that a row has read come again at random
(docs/training.md). The learning rate warms up, then follows a cosine, over the bytes that are to be
read. In the output folder: checkpoint.safetensors, from which `--resume` goes on, with another
budget if need be, log.jsonl, and at the end rwkv7.safetensors (matrices in bf16); the log and the
bits per byte of the whole held-out works go to `--report`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastweights.io import load_metadata, load_tensors, save_tensors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from baselines.rwkv7 import RWKV7, RWKV7Config, RWKV7State, load_rwkv7, save_rwkv7
from record import Record, save_record
from works import read_works

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "training_rwkv7.json"
FIRST_BYTES = 32768  # of each held-out work, while training
PIECE = 1024
IGNORED = -100
PASSAGE = 64, 256  # bytes that come again
DISTANCE = 256, 16384  # bytes after which they do
LINE = 80
CLIP, WARMUP, FINAL_RATIO = 1.0, 0.03, 0.02

Bits = dict[str, float]  # work → bits per byte


# ---- text


@dataclass
class Row:
    """Where a row of the batch reads, and what it read last."""

    work: int = 0
    offset: int = 0
    history: bytes = b""


@dataclass
class Segment:
    """One step's text: each target is the byte behind its input."""

    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], IGNORED behind a work's end
    fresh: Tensor  # bool [B], rows that start with an empty state
    bytes: int = 0


@dataclass
class TextStream:
    """Segments of works: examples/training/batch_stream.cpp in Python."""

    works: list[bytes]
    length: int
    repeat_probability: float
    reset_probability: float
    draw: random.Random
    rows: list[Row] = field(default_factory=list)
    deck: list[int] = field(default_factory=list)

    def start(self, rows: int) -> None:
        """Each row begins somewhere in a work of its own."""
        for _ in range(rows):
            work = self._deal()
            text = self.works[work]
            offset = line_start(text, self.draw.randrange(len(text) - 1))
            self.rows.append(Row(work, offset if offset < len(text) - 1 else 0))

    def next(self) -> Segment:
        shape = len(self.rows), self.length
        segment = Segment(
            torch.zeros(shape, dtype=torch.int64),
            torch.full(shape, IGNORED),
            torch.zeros(len(self.rows), dtype=torch.bool),
        )
        for b, row in enumerate(self.rows):
            if row.offset >= len(self.works[row.work]):
                row.work, row.offset, row.history = self._deal(), 0, b""
            begins = not row.history
            segment.fresh[b] = begins or self.draw.random() < self.reset_probability
            if begins:
                row.history = self.works[row.work][row.offset : row.offset + 1]
                row.offset += 1
            if segment.fresh[b]:  # a passage from before a reset could not be remembered
                row.history = row.history[-1:]
            last = row.history[-1:]
            text = self._read(row)
            segment.inputs[b, : len(text)] = torch.tensor(list(last + text[:-1]))
            segment.targets[b, : len(text)] = torch.tensor(list(text))
            segment.bytes += len(text)
            row.history = (row.history + text)[-DISTANCE[1] - PASSAGE[1] :]
        return segment

    def save(self) -> str:
        """All that decides what comes next, as JSON."""
        rows = [(row.work, row.offset, row.history.decode("latin-1")) for row in self.rows]
        return json.dumps({"rows": rows, "deck": self.deck, "draw": self.draw.getstate()})

    def restore(self, saved: str) -> None:
        given = json.loads(saved)
        self.rows = [Row(work, at, text.encode("latin-1")) for work, at, text in given["rows"]]
        self.deck = given["deck"]
        version, state, gauss = given["draw"]
        self.draw.setstate((version, tuple(state), gauss))

    def _deal(self) -> int:
        if not self.deck:
            self.deck = self.draw.sample(range(len(self.works)), len(self.works))
        return self.deck.pop()

    def _read(self, row: Row) -> bytes:
        ahead = self.works[row.work][row.offset : row.offset + self.length]
        repeat = self._plan_repeat(row, ahead) if len(ahead) == self.length else None
        if repeat is None:
            row.offset += len(ahead)
            return ahead
        place, passage = repeat
        kept = self.length - len(passage)  # the rest is read in the next segment
        row.offset += kept
        return ahead[:place] + passage + ahead[place:kept]

    def _plan_repeat(self, row: Row, ahead: bytes) -> tuple[int, bytes] | None:
        if self.draw.random() >= self.repeat_probability:
            return None
        size = min(self.draw.randint(*PASSAGE), len(ahead) // 2)
        octaves = math.log2(DISTANCE[1] / DISTANCE[0])
        distance = int(DISTANCE[0] * 2 ** (octaves * self.draw.random()))
        place = line_start(ahead, self.draw.randrange(len(ahead) - size))
        place = min(place, len(ahead) - size)
        read = row.history + ahead[:place]
        if distance > len(read):
            return None
        begin = min(line_start(read, len(read) - distance), len(read) - size)
        return place, read[begin : begin + size]


def line_start(text: bytes, place: int) -> int:
    """The first place after a line's end behind `place`, or `place` where none is near."""
    end = text.find(b"\n", place, place + LINE)
    return place if end < 0 else end + 1


# ---- bits per byte


@torch.no_grad()
def held_out_bits(model: RWKV7, works: dict[str, bytes], first: int | None = None) -> Bits:
    """Bits per byte of each work, read from its start with the state carried."""
    out = {}
    for name, text in works.items():
        tokens = torch.tensor(list(text[:first]))[None]
        state, total = None, 0.0
        for begin in range(0, tokens.shape[1] - 1, PIECE):
            piece = tokens[:, begin : begin + PIECE + 1]
            logits, state = model(piece[:, :-1], state)
            total += float(nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum"))
        out[name] = total / math.log(2) / (tokens.shape[1] - 1)
    return out


# ---- training


def learning_rate(peak: float, progress: float) -> float:
    """A linear warm-up, then a cosine down to FINAL_RATIO of the peak."""
    if progress < WARMUP:
        return peak * max(progress / WARMUP, 1e-2)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min((progress - WARMUP) / (1 - WARMUP), 1.0))
    return peak * (FINAL_RATIO + (1 - FINAL_RATIO) * cosine)


def make_optimizer(model: RWKV7) -> torch.optim.AdamW:
    """Weight decay for matrices of projections only; w0 learns twice as fast, as in RWKV-LM."""
    matrices, decays, others = [], [], []
    for name, weight in model.named_parameters():
        if name.endswith("w0"):
            decays.append(weight)
        elif weight.dim() == 2 and name.endswith(".weight") and not name.startswith("emb"):
            matrices.append(weight)
        else:
            others.append(weight)
    groups = [
        {"params": matrices, "weight_decay": 0.1, "factor": 1.0},
        {"params": decays, "weight_decay": 0.0, "factor": 2.0},
        {"params": others, "weight_decay": 0.0, "factor": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


class Trainer:
    """Model, optimizer, text and state, and how far they are."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        torch.manual_seed(arguments.seed)
        self.model = RWKV7(RWKV7Config(feed_forward_width=arguments.feed_forward_width))
        self.optimizer = make_optimizer(self.model)
        self.works = read_works(arguments.texts / "train")
        self.held_out = read_works(arguments.texts / "held_out")
        self.stream = TextStream(
            list(self.works.values()),
            arguments.segment,
            arguments.repeat_probability,
            arguments.reset_probability,
            random.Random(arguments.seed),
        )
        self.stream.start(arguments.batch)
        self.state = self.model.initial_state(arguments.batch)
        self.steps, self.bytes, self.seconds = 0, 0, 0.0

    @property
    def path(self) -> Path:
        folder: Path = self.arguments.output
        return folder / "checkpoint.safetensors"

    def step(self) -> dict[str, float]:
        """One step; its loss in bits per byte."""
        segment = self.stream.next()
        rate = learning_rate(self.arguments.learning_rate, self.bytes / self.arguments.bytes)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        state = self.state.detach().reset_rows(segment.fresh)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.arguments.bf16):
            logits, self.state = self.model(segment.inputs, state)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), segment.targets.flatten(), ignore_index=IGNORED
        )
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        if not torch.isfinite(norm):
            sys.exit(f"train_rwkv7: the gradient of step {self.steps + 1} is not finite")
        self.optimizer.step()
        self.steps += 1
        self.bytes += segment.bytes
        return {
            "bits_per_byte": float(loss.detach()) / math.log(2),
            "gradient_norm": float(norm),
            "learning_rate": rate,
        }

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        tensors |= {f"state.{name}": x.detach() for name, x in self.state.tensors().items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": x for name, x in slot.items()}
        progress = {"steps": self.steps, "bytes": self.bytes, "seconds": self.seconds}
        metadata = {"stream": self.stream.save(), "progress": json.dumps(progress)}
        save_tensors(self.path, tensors, metadata)

    def restore(self) -> None:
        kinds: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_tensors(self.path).items():
            kind, rest = name.split(".", 1)
            kinds.setdefault(kind, {})[rest] = tensor
        self.model.load_state_dict(kinds["model"])
        self.state = RWKV7State.from_tensors(kinds["state"])
        saved = self.optimizer.state_dict()
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in kinds["optimizer"].items():
            index, field_name = name.split(".")
            slots.setdefault(int(index), {})[field_name] = tensor
        self.optimizer.load_state_dict({**saved, "state": slots})
        metadata = load_metadata(self.path)
        self.stream.restore(metadata["stream"])
        progress = json.loads(metadata["progress"])
        self.steps, self.bytes = progress["steps"], progress["bytes"]
        self.seconds = progress["seconds"]


def train(trainer: Trainer, arguments: argparse.Namespace) -> bool:
    """Trains until the bytes are read; False if a signal came before."""
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(True))
    log = arguments.output / "log.jsonl"
    saved = time.monotonic()
    begin = saved - trainer.seconds
    window: list[dict[str, float]] = []

    def write(event: str, **row: Any) -> None:
        place = {"event": event, "step": trainer.steps, "bytes": trainer.bytes}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**place, "seconds": trainer.seconds, **row}) + "\n")

    def evaluate() -> None:
        bits = held_out_bits(trainer.model.eval(), trainer.held_out, FIRST_BYTES)
        trainer.model.train()
        mean = sum(bits.values()) / len(bits)
        write("evaluation", held_out=bits, mean=mean, first_bytes=FIRST_BYTES)

    write("start", recipe=recipe(arguments))
    with tqdm(total=int(arguments.bytes), unit="B", unit_scale=True, initial=trainer.bytes) as bar:
        while trainer.bytes < arguments.bytes and not stopped:
            window.append(trainer.step())
            trainer.seconds = time.monotonic() - begin
            bar.update(trainer.bytes - bar.n)
            if trainer.steps % arguments.log_every == 0:
                mean = {name: sum(row[name] for row in window) / len(window) for name in window[0]}
                write("train", **mean)
                bar.set_postfix_str(f"{mean['bits_per_byte']:.3f} bits per byte")
                window.clear()
            if trainer.steps % arguments.evaluate_every == 0:
                evaluate()
            if time.monotonic() - saved > arguments.checkpoint_seconds:
                trainer.save()
                saved = time.monotonic()
    trainer.save()
    if not stopped:
        evaluate()
    return not stopped


def recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide what is learned."""
    return {n: value for n, value in vars(arguments).items() if not isinstance(value, Path)}


def report(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Writes the weights; reads the held-out works whole with the weights as they are in the file.

    All that was measured goes to the report.
    """
    path = arguments.output / "rwkv7.safetensors"
    save_rwkv7(path, trainer.model, torch.bfloat16)
    model = load_rwkv7(path)
    bits = held_out_bits(model, trainer.held_out)
    summary = {
        "event": "summary",
        "parameters": model.parameter_count(),
        "config": asdict(model.config),
        "state_bytes": sum(x.nbytes for x in model.initial_state(1)),
        "recipe": recipe(arguments),
        "steps": trainer.steps,
        "bytes_read": trainer.bytes,
        "training_works": len(trainer.works),
        "training_bytes": sum(map(len, trainer.works.values())),
        "seconds": trainer.seconds,
        "held_out": bits,
    }
    with (arguments.output / "log.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    title = "Training of the baseline RWKV-7: its summary, then every record of its log"
    save_record(arguments.report, Record(title, [summary, *rows]))
    print(
        f"{trainer.steps} steps, {trainer.bytes:,} bytes read, {trainer.seconds / 60:.0f} minutes"
    )
    for name, value in bits.items():
        print(f"{name}: {value:.3f} bits per byte")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, default=ROOT / "data" / "plays")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "train" / "rwkv7")
    parser.add_argument("--report", type=Path, default=RESULT)
    parser.add_argument("--bytes", type=float, default=4e6, help="to read in all")
    parser.add_argument("--feed-forward-width", type=int, default=1504)
    parser.add_argument("--batch", type=int, default=4, help="rows, each reading its own work")
    parser.add_argument("--segment", type=int, default=512, help="bytes between truncations")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak")
    parser.add_argument("--repeat-probability", type=float, default=0.25)
    parser.add_argument("--reset-probability", type=float, default=0.02)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--checkpoint-seconds", type=float, default=120.0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments)
    if arguments.resume:
        trainer.restore()
    elif trainer.path.exists():
        parser.error(f"{trainer.path} exists: --resume goes on from it")
    if train(trainer, arguments):
        report(trainer, arguments)


if __name__ == "__main__":
    main()
