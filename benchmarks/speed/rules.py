"""Times every rule against the peers and the machine's limits, in turn, in one run.

For each case the library and its peers are called alternately on the same inputs, so that a drift
of the machine hits all of them; a ratio is taken pair by pair, and a peer's result must agree with
ours before it is timed. Limits (multiply-adds a second, copied bytes a second) come from the
program machine_limits, run before and after. Everything goes into one JSON file,
benchmarks/results/speed_rules.json unless told otherwise, with plots beside it.

    cmake --build build/release --target machine_limits fastweights_python
    PYTHONPATH=build/release/python python benchmarks/speed/rules.py --install-peers
    … rules.py --only gated_delta_rule --threads 1 --samples 9
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from peers import PACKAGES, PEERS, Inputs, Rule, Shape

from fastweights import ops
from record import Record, save_record

RESULT = ROOT / "benchmarks" / "results" / "speed_rules.json"
Row = dict[str, Any]

RULES: dict[str, Rule] = {
    "gated_delta_rule": lambda x: ops.gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)[0],
    "delta_rule": lambda x: ops.delta_rule(x.q, x.k, x.v, x.beta)[0],
    "linear_attention": lambda x: ops.linear_attention(x.q, x.k, x.v, x.g)[0],
    "kda": lambda x: ops.kda(x.q, x.k, x.v, x.channel_g, x.beta)[0],
    "generalized_delta_rule": lambda x: ops.generalized_delta_rule(
        x.q, x.k, x.v, x.a, x.b, x.channel_g
    )[0],
    "momentum_delta_rule": lambda x: ops.momentum_delta_rule(
        x.q, x.k, x.v, x.g, x.beta, x.mu, x.eta
    )[0],
}
INPUTS = {
    "gated_delta_rule": ("q", "k", "v", "g", "beta"),
    "delta_rule": ("q", "k", "v", "beta"),
    "linear_attention": ("q", "k", "v", "g"),
    "kda": ("q", "k", "v", "channel_g", "beta"),
    "generalized_delta_rule": ("q", "k", "v", "a", "b", "channel_g"),
    "momentum_delta_rule": ("q", "k", "v", "g", "beta", "mu", "eta"),
}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    rule: str
    shape: Shape
    threads: int
    kind: str  # "forward", "forward+backward" or "decode"
    dtype: torch.dtype = torch.float32


def cases(threads: list[int]) -> Iterator[Case]:
    """The shapes that are asked for: length, heads, sizes, then the other rules, then decoding."""
    for count in threads:
        gated = Case("gated_delta_rule", Shape(1, 512, 16, 128), count, "forward")
        for tokens in (512, 1024, 4096):
            yield replace(gated, shape=Shape(1, tokens, 16, 128))
        for heads in (1, 2, 4, 8):
            yield replace(gated, shape=Shape(1, 4096, heads, 128))
        for size in (64, 96, 256):
            yield replace(gated, shape=Shape(1, 1024, 16, size))
        yield replace(gated, dtype=torch.bfloat16, shape=Shape(1, 4096, 16, 128))
        for tokens in (1024, 4096):
            yield replace(gated, shape=Shape(1, tokens, 16, 128), kind="forward+backward")
        for rule in RULES:
            if rule == gated.rule:
                continue
            for kind in ("forward", "forward+backward"):
                yield Case(rule, Shape(1, 1024, 16, 128), count, kind)
        yield Case("generalized_delta_rule", Shape(1, 4096, 32, 64), count, "forward")
        yield Case("gated_delta_rule", Shape(1, 4096, 32, 64), count, "forward")
        for tokens in (1, 2, 4, 8):
            yield Case("gated_delta_rule", Shape(1, tokens, 16, 128), count, "decode")
        yield Case("gated_delta_rule", Shape(64, 1, 16, 128), count, "decode")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bound(case: Case, rule: Rule, inputs: Inputs) -> Callable[[], object]:
    """The call that is timed."""
    if case.kind == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return rule(inputs)

        return forward
    leaves = inputs.requiring_gradients()
    wanted = [getattr(leaves, name) for name in INPUTS[case.rule]]

    def forward_and_backward() -> object:
        return torch.autograd.grad(rule(leaves).square().sum(), wanted)

    return forward_and_backward


def peers_of(case: Case, inputs: Inputs) -> dict[str, Rule]:
    """The peers that can do this case, each of which agrees with us."""
    if case.rule != "gated_delta_rule" or case.dtype != torch.float32:
        return {}
    names = ["transformers"] if case.kind == "forward+backward" else list(PEERS)
    made = {}
    for name in names:
        if importlib.util.find_spec(name) is None:
            continue
        peer = PEERS[name](case.shape, case.threads)
        with torch.no_grad():
            expected, got = RULES[case.rule](inputs), peer(inputs)
        error = ((expected - got).square().mean() / expected.square().mean()).sqrt().item()
        if not error < 1e-4:
            sys.exit(f"{name} differs from fastweights at {case.shape}: {error:.1e}")
        made[name] = peer
    return made


def repeats(call: Callable[[], object]) -> int:
    """Calls to a sample, so that one takes at least 20 ms."""
    once = min(seconds(call) for _ in range(3))
    return max(1, min(2000, int(0.02 / max(once, 1e-7))))


def sample(call: Callable[[], object], count: int) -> float:
    return seconds(lambda: [call() for _ in range(count)]) / count


def alternate(calls: dict[str, Callable[[], object]], samples: int) -> dict[str, list[float]]:
    """Seconds a call, the calls taking turns."""
    counts = {name: repeats(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            times[name].append(sample(call, counts[name]))
    return times


def measure(case: Case, samples: int, flop_per_second: float) -> Row:
    torch.set_num_threads(case.threads)
    if case.kind == "decode":
        return measure_decoding(case, samples)
    inputs = Inputs.random(case.shape, case.dtype)
    calls = {"fastweights": bound(case, RULES[case.rule], inputs)}
    for name, peer in peers_of(case, inputs).items():
        calls[name] = bound(case, peer, inputs)
    times = alternate(calls, samples)
    row = row_of(case, times)
    if case.kind == "forward":
        row["gflop_per_second"] = case.shape.forward_flop / row["seconds_median"] / 1e9
        row["share_of_peak"] = row["gflop_per_second"] * 1e9 / flop_per_second
    return row


def measure_decoding(case: Case, samples: int) -> Row:
    """The recurrent form in place, beside a copy of the state."""
    shape = case.shape
    inputs = Inputs.random(shape)
    state = torch.zeros(shape.batch, shape.heads, shape.size, shape.size)
    target = torch.empty_like(state)

    def decode() -> Tensor:
        return ops.gated_delta_rule_recurrent_(
            inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, state
        )

    times = alternate({"fastweights": decode, "copy": lambda: target.copy_(state)}, samples)
    row = row_of(case, times)
    row["times_of_a_copy"] = 1 / row["peers"]["copy"]["ratio"]
    return row


def row_of(case: Case, times: dict[str, list[float]]) -> Row:
    ours = times.pop("fastweights")
    return {
        "rule": case.rule,
        "shape": vars(case.shape),
        "threads": case.threads,
        "kind": case.kind,
        "dtype": str(case.dtype).removeprefix("torch."),
        "seconds": ours,
        "seconds_median": statistics.median(ours),
        "peers": {
            name: {
                "seconds": theirs,
                "ratio": statistics.median(t / o for t, o in zip(theirs, ours, strict=True)),
            }
            for name, theirs in times.items()
        },
    }


def machine_limits(program: Path, threads: int) -> Row:
    output = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True)
    limits: Row = json.loads(output.stdout)
    return limits


def find_machine_limits(given: Path | None) -> Path:
    built = sorted(ROOT.glob("build/*/benchmarks/machine_limits"), key=lambda p: p.stat().st_mtime)
    if given is not None:
        return given
    if not built:
        sys.exit("build it first: cmake --build build/release --target machine_limits")
    return built[-1]


def print_table(rows: list[Row]) -> None:
    print(f"{'rule':24}{'shape':26}{'pass':18}{'thr':>4}{'ms':>10}{'peak':>7}  peers")
    for row in rows:
        share = f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else ""
        peers = ", ".join(f"{peer['ratio']:.2f}x {name}" for name, peer in row["peers"].items())
        kind = row["kind"] + ("" if row["dtype"] == "float32" else " " + row["dtype"])
        print(
            f"{row['rule']:24}{Shape(**row['shape'])!s:26}{kind:18}{row['threads']:>4}"
            f"{row['seconds_median'] * 1e3:>10.3f}{share:>7}  {peers}"
        )


def plot(rows: list[Row], path: Path) -> None:
    """Time against tokens, against heads, and rates of the rules by threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_tokens, by_heads, by_rule) = plt.subplots(1, 3, figsize=(15, 4.4))
    gated = [
        r
        for r in rows
        if r["rule"] == "gated_delta_rule"
        and r["kind"] == "forward"
        and r["dtype"] == "float32"
        and r["shape"]["size"] == 128
    ]
    threads = sorted({r["threads"] for r in rows})
    for count in threads:
        mine = [r for r in gated if r["threads"] == count]
        by_length = sorted((r for r in mine if r["shape"]["heads"] == 16), key=_tokens)
        by_tokens.plot(
            [_tokens(r) for r in by_length],
            [r["seconds_median"] * 1e3 for r in by_length],
            "o-",
            label=f"fastweights, {count} thread{'s' * (count > 1)}",
        )
        for name in sorted({name for r in by_length for name in r["peers"]}):
            by_tokens.plot(
                [_tokens(r) for r in by_length],
                [statistics.median(r["peers"][name]["seconds"]) * 1e3 for r in by_length],
                "s--",
                label=f"{name}, {count}",
            )
        heads = sorted((r for r in mine if _tokens(r) == 4096), key=lambda r: r["shape"]["heads"])
        by_heads.plot(
            [r["shape"]["heads"] for r in heads],
            [r["gflop_per_second"] for r in heads],
            "o-",
            label=f"{count} thread{'s' * (count > 1)}",
        )
    by_tokens.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward, H 16, K=V 128")
    lengths = sorted({_tokens(r) for r in gated if r["shape"]["heads"] == 16})
    by_tokens.set_xticks(lengths, [str(length) for length in lengths])
    by_tokens.minorticks_off()
    by_rule.margins(x=0.12)
    by_heads.set(xlabel="heads", ylabel="GFLOP/s (6KV), T 4096", ylim=(0, None))
    others = [r for r in rows if r["kind"] == "forward" and _tokens(r) == 1024]
    others = [r for r in others if r["shape"]["size"] == 128 and r["dtype"] == "float32"]
    names = list(dict.fromkeys(r["rule"] for r in others))
    width = 0.8 / len(threads)
    for index, count in enumerate(threads):
        values = {r["rule"]: r["seconds_median"] * 1e3 for r in others if r["threads"] == count}
        places = [i + index * width for i in range(len(names))]
        bars = by_rule.barh(
            places, [values[n] for n in names], width, label=f"{count} thread{'s' * (count > 1)}"
        )
        by_rule.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    by_rule.set_yticks([i + 0.4 - width / 2 for i in range(len(names))], names, fontsize=8)
    by_rule.set(xlabel="ms, forward, T 1024, H 16, K=V 128")
    by_rule.invert_yaxis()
    for axes in (by_tokens, by_heads, by_rule):
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _tokens(row: Row) -> int:
    tokens: int = row["shape"]["tokens"]
    return tokens


def install_peers() -> None:
    packages = [package for names in PACKAGES.values() for package in names]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(RULES), help="these rules alone")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--samples", type=int, default=7, help="turns for each figure")
    parser.add_argument("--install-peers", action="store_true", help="pip install them first")
    parser.add_argument(
        "--machine-limits", type=Path, help="the program; found in build/ if left out"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.install_peers:
        install_peers()
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)} (see --install-peers)")
    program = find_machine_limits(arguments.machine_limits)
    limits = {count: [machine_limits(program, count)] for count in arguments.threads}
    rows = []
    chosen = [c for c in cases(arguments.threads) if not arguments.only or c.rule in arguments.only]
    for case in tqdm(chosen, unit="case", leave=False):
        flop = limits[case.threads][0]["multiply_add_flop_per_second"]
        rows.append(measure(case, arguments.samples, flop))
    for count, measured in limits.items():
        measured.append(machine_limits(program, count))
    print_table(rows)
    every_limit = [limit for measured in limits.values() for limit in measured]
    for limit in every_limit:
        print(
            f"limit, {limit['threads']} thr: "
            f"{limit['multiply_add_flop_per_second'] / 1e9:.0f} GFLOP/s multiply-add, copy "
            f"{limit['copy_bytes_per_second_in_cache'] / 1e9:.0f} GB/s in cache, "
            f"{limit['copy_bytes_per_second_in_memory'] / 1e9:.0f} GB/s in memory"
        )
    rows.extend({"limit": limit} for limit in every_limit)
    save_record(arguments.output, Record(title="rules on a CPU", rows=rows))
    plot([r for r in rows if "rule" in r], arguments.output.with_suffix(".png"))
    print(f"written: {arguments.output.name} and {arguments.output.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
