"""Times whole language models against the peers' and the machine's limits, in turn, in one run.

Models of some 27 million random weights (language_models.py) read 2048 bytes, decode 64, and train
on 1024 (forward, backward and a fused AdamW step), with weights in fp32 and in bf16. All take
turns, so that a drift of the machine hits all of them; a ratio is taken turn by turn, against the
peer that is best in either precision. Peers run in inference mode. The limits are the weights'
bytes over the memory's read rate (program machine_limits) and ATen's matrix products.

    cmake --build build/release --target machine_limits fastweights_python
    PYTHONPATH=build/release/python python benchmarks/speed/models.py --install-peers
    … models.py --only decode --threads 2 --keep

`--keep` keeps the other rows of the result file; every row carries its own commit and date.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import language_models
from language_models import MODELS, PACKAGES, LanguageModel

from record import Record, commit, save_record

RESULT = ROOT / "benchmarks" / "results" / "speed_models.json"
KINDS = ("read", "decode", "train", "start")
TOKENS = {"read": 2048, "decode": 64, "train": 1024}
CONTEXT = 512  # bytes that every model has read before it decodes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "fastweights"
Row = dict[str, Any]
Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """A model in one precision."""

    name: str
    precision: str

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


def text(size: int) -> bytes:
    generator = torch.Generator().manual_seed(1)
    return bytes(torch.randint(32, 127, (size,), generator=generator).tolist())


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- what is timed


def reading(model: LanguageModel) -> Call:
    content = text(TOKENS["read"])
    return lambda: model.read(content)


def decoding(model: LanguageModel) -> Call:
    model.read(text(CONTEXT))
    return lambda: model.decode(TOKENS["decode"])


def training(contender: Contender, folder: Path) -> Call:
    """One step on one row of text, as PyTorch's users write it."""
    trainable = MODELS[contender.name].trainable(folder, DTYPES[contender.precision])
    optimizer = torch.optim.AdamW(trainable.module.parameters(), lr=1e-5, fused=True)
    tokens = torch.tensor([list(text(TOKENS["train"] + 1))])

    def step() -> None:
        logits = trainable.logits(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[0, 1:])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def call_of(kind: str, contender: Contender, folder: Path) -> Call:
    if kind == "train":
        return training(contender, folder)
    model: LanguageModel = MODELS[contender.name](folder, DTYPES[contender.precision])
    return reading(model) if kind == "read" else decoding(model)


def contenders(kind: str) -> Iterator[Contender]:
    for name, model in MODELS.items():
        available = name == OURS or importlib.util.find_spec(package_of(name)) is not None
        if available and (kind != "train" or hasattr(model, "trainable")):
            yield from (Contender(name, precision) for precision in DTYPES)


def package_of(name: str) -> str:
    return {"rwkv7": "rwkv", "qwen3.5": "transformers"}[name]


# ---- rows


def measure(kind: str, threads: int, samples: int, folder: Path) -> list[Row]:
    torch.set_num_threads(threads)
    calls = {contender: call_of(kind, contender, folder) for contender in contenders(kind)}
    for call in calls.values():
        call()
        call()  # TorchScript compiles in the second call
    rates: dict[Contender, list[float]] = {contender: [] for contender in calls}
    for _ in tqdm(range(samples), desc=f"{kind}, {threads} threads", leave=False):
        for contender, call in calls.items():
            rates[contender].append(TOKENS[kind] / seconds(call))
    return [row_of(kind, threads, contender, rates) for contender in rates]


def row_of(
    kind: str, threads: int, contender: Contender, rates: dict[Contender, list[float]]
) -> Row:
    mine = rates[contender]
    row: Row = {
        "kind": kind,
        "threads": threads,
        "model": contender.name,
        "precision": contender.precision,
        "tokens_per_second": mine,
        "tokens_per_second_median": statistics.median(mine),
    }
    peers = {peer: theirs for peer, theirs in rates.items() if peer.name != OURS}
    if contender.name == OURS and peers:
        best = max(peers, key=lambda peer: statistics.median(peers[peer]))
        row["best_peer"] = str(best)
        row["ratio"] = statistics.median(m / p for m, p in zip(mine, peers[best], strict=True))
    return row


def measure_start(threads: int, samples: int, folder: Path) -> list[Row]:
    """Load and first token, each in a process of its own; imports are not counted."""
    rows: dict[Contender, list[Row]] = {contender: [] for contender in contenders("start")}
    program = Path(language_models.__file__)
    for _ in tqdm(range(samples), desc=f"start, {threads} threads", leave=False):
        for contender, found in rows.items():
            dtype = str(DTYPES[contender.precision]).removeprefix("torch.")
            command = [sys.executable, *map(str, (program, contender.name, folder, dtype, threads))]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
    return [
        {"kind": "start", "threads": threads, "model": c.name, "precision": c.precision}
        | {key: [sample[key] for sample in found] for key in found[0]}
        | {f"{key}_median": statistics.median(s[key] for s in found) for key in found[0]}
        for c, found in rows.items()
    ]


def parameters(folder: Path) -> dict[str, int]:
    names = dict.fromkeys(contender.name for contender in contenders("read"))
    return {name: MODELS[name](folder, torch.float32).parameters for name in names}


def product_rate(dtype: torch.dtype) -> float:
    """Flop a second of ATen's matrix products, at the size of a reading model's."""
    x, w = torch.randn(2048, 512).to(dtype), torch.randn(2048, 512).to(dtype)
    calls = [seconds(lambda: torch.nn.functional.linear(x, w)) for _ in range(50)]
    return 2 * 2048 * 2048 * 512 / min(calls)


def limits(threads: int, program: Path) -> Row:
    torch.set_num_threads(threads)
    output = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True)
    found: Row = {"kind": "limits"} | json.loads(output.stdout)
    for precision, dtype in DTYPES.items():
        found[f"product_flop_per_second_{precision}"] = product_rate(dtype)
    return found


def add_shares(rows: list[Row], limit: Row, count: int) -> None:
    """Of our rows: the share of the read rate (decode) or of ATen's products (read, train)."""
    for row in rows:
        if row.get("model") != OURS or row["kind"] == "start":
            continue
        rate, precision = row["tokens_per_second_median"], row["precision"]
        if row["kind"] == "decode":
            bytes_each = DTYPES[precision].itemsize * count
            row["share_of_read_rate"] = rate * bytes_each / limit["read_bytes_per_second_in_memory"]
        else:
            flop = (2 if row["kind"] == "read" else 6) * count * rate
            row["share_of_products"] = flop / limit[f"product_flop_per_second_{precision}"]


# ---- output


def print_table(rows: list[Row]) -> None:
    for row in rows:
        head = f"{row['kind']:7}{row['threads']:>2} thr"
        if row["kind"] == "limits":
            rates = ", ".join(f"{k} {v / 1e9:.0f}e9" for k, v in row.items() if "per_second" in k)
            print(f"{head}  {rates}")
            continue
        head += f"  {row['model']:12}{row['precision']:5}"
        if row["kind"] == "start":
            load, first = row["load_seconds_median"], row["first_token_seconds_median"]
            print(f"{head}{load * 1e3:9.0f} ms to load, {first * 1e3:.1f} ms to the first token")
            continue
        line = f"{head}{row['tokens_per_second_median']:9.0f} tokens/s"
        if "ratio" in row:
            line += f"  {row['ratio']:.2f}x {row['best_peer']}"
        line += "".join(f", {v:.0%} {k}" for k, v in row.items() if k.startswith("share"))
        print(line)


def plot(rows: list[Row], path: Path) -> None:
    """Tokens a second by kind; a group of bars for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for axis, kind in zip(axes, ("read", "decode", "train"), strict=True):
        mine = [r for r in rows if r["kind"] == kind]
        threads = sorted({r["threads"] for r in mine})
        labels = list(dict.fromkeys(f"{r['model']} {r['precision']}" for r in mine))
        for index, count in enumerate(threads):
            chosen = [r for r in mine if r["threads"] == count]
            bars = axis.barh(
                [labels.index(f"{r['model']} {r['precision']}") + index * 0.4 for r in chosen],
                [r["tokens_per_second_median"] for r in chosen],
                0.38,
                label=f"{count} thread{'s' * (count > 1)}",
            )
            axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axis.set_yticks([i + 0.2 for i in range(len(labels))], labels, fontsize=8)
        axis.set(xlabel="tokens/s", title=kind)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        if threads:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--samples", type=int, default=5, help="turns for each figure")
    parser.add_argument("--keep", action="store_true", help="keep the result file's other rows")
    parser.add_argument("--install-peers", action="store_true", help="pip install them first")
    parser.add_argument(
        "--machine-limits", type=Path, help="the program; found in build/ if left out"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


def find_machine_limits(given: Path | None) -> Path:
    built = sorted(ROOT.glob("build/*/benchmarks/machine_limits"), key=lambda p: p.stat().st_mtime)
    if given is None and not built:
        sys.exit("build it first: cmake --build build/release --target machine_limits")
    return given or built[-1]


def measure_all(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    for model in MODELS.values():
        model.make(folder)
    program = find_machine_limits(arguments.machine_limits)
    counts = parameters(folder)
    rows: list[Row] = []
    for threads in arguments.threads:
        limit = limits(threads, program)
        found: list[Row] = [limit]
        for kind in arguments.only:
            if kind == "start":
                found += measure_start(threads, arguments.samples, folder)
            else:
                found += measure(kind, threads, arguments.samples, folder)
        add_shares(found, limit, counts[OURS])
        rows += found
    now = datetime.now(timezone.utc).isoformat("T", "seconds")
    for row in rows:
        row |= {"commit": commit(), "date": now}
        if "model" in row:
            row["parameters"] = counts[row["model"]]
    return rows


def kept_rows(path: Path, rows: list[Row]) -> list[Row]:
    if not path.exists():
        return []
    fresh = {(row["kind"], row["threads"]) for row in rows}
    before: list[Row] = json.loads(path.read_text())["rows"]
    return [row for row in before if (row["kind"], row["threads"]) not in fresh]


def main() -> None:
    warnings.filterwarnings("ignore")
    arguments = parse_arguments()
    if arguments.install_peers:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(arguments, Path(folder))
    print_table(rows)
    if arguments.keep:
        rows = kept_rows(arguments.output, rows) + rows
    save_record(arguments.output, Record(title="language models on a CPU", rows=rows))
    plot(rows, arguments.output.with_suffix(".png"))
    print(f"written: {arguments.output.name} and {arguments.output.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
