"""Times the delta rules against transformers' PyTorch implementation, in turn, in one run.

For each shape and number of threads the two are called alternately on the same inputs, so that a
drift of the machine hits both; the ratio is taken pair by pair. Everything measured goes into one
JSON file, `benchmarks/results/speed_delta_rules.json` unless told otherwise, with a plot beside it.

    python benchmarks/speed/delta_rules.py
    python benchmarks/speed/delta_rules.py --shapes 1x512x16x128 --threads 1 2 --samples 9
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fastweights import ops
from record import Record, save_record

DEFAULT_SHAPES = ["1x512x16x128", "1x1024x16x128", "1x4096x16x128", "1x1024x4x128", "8x512x4x64"]
RESULT = Path(__file__).resolve().parents[1] / "results" / "speed_delta_rules.json"


@dataclass(frozen=True)
class Shape:
    """Batch rows, tokens, heads, and the size of a key and of a value."""

    batch: int
    tokens: int
    heads: int
    size: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        try:
            return cls(*(int(part) for part in text.split("x")))
        except (TypeError, ValueError) as error:
            message = f"a shape is BATCHxTOKENSxHEADSxSIZE, e.g. 1x512x16x128; got {text!r}"
            raise argparse.ArgumentTypeError(message) from error

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} H{self.heads} K=V={self.size}"

    @property
    def forward_flop(self) -> int:
        """6·K·V per token and head: two reads of the state and one write."""
        return 6 * self.size**2 * self.batch * self.tokens * self.heads


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, requires_grad: bool) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        rows = (shape.batch, shape.tokens, shape.heads)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        tensors = [normal(*rows, shape.size) for _ in range(3)]
        tensors.append(-0.1 * normal(*rows).abs())
        tensors.append(torch.rand(*rows, generator=generator))
        return cls(*(tensor.requires_grad_(requires_grad) for tensor in tensors))

    def tensors(self) -> list[torch.Tensor]:
        return [self.q, self.k, self.v, self.g, self.beta]


Rule = Callable[[Inputs], torch.Tensor]
Row = dict[str, Any]


def ours(x: Inputs) -> torch.Tensor:
    return ops.gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, use_qk_l2norm=True)[0]


def load_transformers() -> Rule:
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError as error:
        sys.exit(f"transformers is needed as the peer: pip install transformers ({error})")

    def transformers_rule(x: Inputs) -> torch.Tensor:
        o: torch.Tensor = torch_chunk_gated_delta_rule(
            x.q, x.k, x.v, g=x.g, beta=x.beta, use_qk_l2norm_in_kernel=True
        )[0]
        return o

    return transformers_rule


def seconds(rule: Rule, inputs: Inputs, backward: bool) -> float:
    start = time.perf_counter()
    if backward:
        output = rule(inputs)
        torch.autograd.grad(output.square().sum(), inputs.tensors())
    else:
        with torch.no_grad():
            rule(inputs)
    return time.perf_counter() - start


def measure(shape: Shape, threads: int, backward: bool, samples: int, peer: Rule) -> Row:
    torch.set_num_threads(threads)
    inputs = Inputs.random(shape, backward)
    for rule in (ours, peer):  # warm up
        seconds(rule, inputs, backward)
    pairs = [
        (seconds(ours, inputs, backward), seconds(peer, inputs, backward)) for _ in range(samples)
    ]
    median = statistics.median(mine for mine, _ in pairs)
    row: Row = {
        "shape": vars(shape),
        "threads": threads,
        "pass": "forward+backward" if backward else "forward",
        "seconds": [mine for mine, _ in pairs],
        "peer_seconds": [theirs for _, theirs in pairs],
        "ratio_median": statistics.median(theirs / mine for mine, theirs in pairs),
    }
    if not backward:
        row["gflop_per_second"] = shape.forward_flop / median / 1e9
    return row


def print_table(rows: list[Row]) -> None:
    print(f"{'shape':28}{'pass':18}{'threads':>8}{'ms':>10}{'peer ms':>10}{'ratio':>8}")
    for row in rows:
        mine = statistics.median(row["seconds"]) * 1e3
        theirs = statistics.median(row["peer_seconds"]) * 1e3
        print(
            f"{Shape(**row['shape'])!s:28}{row['pass']:18}{row['threads']:>8}"
            f"{mine:>10.2f}{theirs:>10.2f}{row['ratio_median']:>7.1f}x"
        )


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{Shape(**r['shape'])}\n{r['pass']}, {r['threads']} thr." for r in rows]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    ratios = [row["ratio_median"] for row in rows]
    bars = axes.barh(range(len(rows)), ratios, color="#3b6ea5")
    axes.bar_label(bars, [f"{ratio:.1f}×" for ratio in ratios], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ratios) * 1.12)
    axes.set_xlabel("times as fast as transformers' PyTorch path (fp32, same run)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=Shape.parse,
        metavar="BxTxHxK",
        default=[Shape.parse(text) for text in DEFAULT_SHAPES],
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--samples", type=int, default=7, help="pairs of calls for each figure")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    peer = load_transformers()
    cases = [
        (shape, threads, backward)
        for shape in arguments.shapes
        for backward in (False, True)
        for threads in arguments.threads
    ]
    rows = [
        measure(shape, threads, backward, arguments.samples, peer)
        for shape, threads, backward in tqdm(cases, unit="case", leave=False)
    ]
    print_table(rows)
    save_record(arguments.output, Record(title="delta rules on a CPU", rows=rows))
    plot(rows, arguments.output.with_suffix(".png"))
    print(f"written: {arguments.output} and {arguments.output.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
