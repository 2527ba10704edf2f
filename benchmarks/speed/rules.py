"""Times every rule against the peers and the machine's limits, in turn, in one run.

For each case the library and its peers are called alternately on the same inputs, so that a drift
of the machine hits all of them; a ratio is taken pair by pair, and a peer's result must agree with
ours before it is timed. Limits (multiply-adds a second, copied bytes a second) come from the
program machine_limits, run before and after. Everything goes into one JSON file,
benchmarks/results/speed_rules.json unless told otherwise, with plots beside it where no case was
left out.

    cmake --build build/release --target machine_limits fastweights_python
    PYTHONPATH=build/release/python python benchmarks/speed/rules.py --install-peers
    … rules.py --only gated_delta_rule --kinds forward --threads 1 --samples 9
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
from calls import INPUTS, RULES, forward, forward_and_backward
from peers import PACKAGES, PEERS, TRAINABLE, Inputs, Rule, Shape

from fastweights import ops
from record import Record, save_record

RESULT = ROOT / "benchmarks" / "results" / "speed_rules.json"
Row = dict[str, Any]

# Rules whose time is shown beside that of the gated delta rule on the same shape.
BESIDE_GATED = ("kda", "generalized_delta_rule", "rwkv7")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    rule: str
    shape: Shape
    threads: int
    kind: str  # "forward", "forward+backward", "decode" or "memory"
    dtype: torch.dtype = torch.float32  # of the inputs; in decoding that of the state


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
        for tokens in (1024, 4096):
            yield replace(gated, shape=Shape(1, tokens, 16, 128), kind="forward+backward")
        for rule in RULES:
            if rule in ("gated_delta_rule", "rwkv7"):  # above, and the generalized rule by name
                continue
            for kind in ("forward", "forward+backward"):
                yield Case(rule, Shape(1, 1024, 16, 128), count, kind)
        rwkv = Case("rwkv7", Shape(1, 4096, 32, 64), count, "forward")
        yield rwkv
        yield replace(rwkv, kind="forward+backward")
        for half in (
            replace(gated, shape=Shape(1, 4096, 16, 128)),
            replace(gated, shape=Shape(1, 1024, 16, 128), kind="forward+backward"),
            Case("kda", Shape(1, 1024, 16, 128), count, "forward"),
            rwkv,
        ):
            yield replace(half, dtype=torch.bfloat16)
        for tokens in (1, 2, 4, 8):
            yield Case("gated_delta_rule", Shape(1, tokens, 16, 128), count, "decode")
        far = Case("gated_delta_rule", Shape(64, 1, 16, 128), count, "decode")
        yield far
        for tokens in (1, 4):
            yield replace(far, shape=Shape(1, tokens, 16, 128), dtype=torch.bfloat16)
        yield replace(far, dtype=torch.bfloat16)
        yield replace(gated, shape=Shape(1, 1024, 16, 128), kind="memory")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bound(case: Case, inputs: Inputs, peer: Rule | None = None) -> Callable[[], object]:
    """The call that is timed."""
    if case.kind == "forward":
        return forward(case.rule, inputs, peer)
    return forward_and_backward(case.rule, inputs, peer)


def peer_names(case: Case) -> list[str]:
    """The installed peers that can do this case."""
    if case.dtype != torch.float32:
        return []
    names = PEERS.get(case.rule, {})
    if case.kind != "forward":
        names = {name: names[name] for name in names if name in TRAINABLE}
    return [name for name in names if importlib.util.find_spec(name) is not None]


def peers_of(case: Case, inputs: Inputs) -> dict[str, Rule]:
    """The peers that can do this case, each of which agrees with us."""
    made = {}
    for name in peer_names(case):
        peer = PEERS[case.rule][name](case.shape, case.threads)
        expected = forward(case.rule, inputs)()
        error = relative_error(forward(case.rule, inputs, peer)(), expected)
        if not error < 1e-4:
            sys.exit(f"{name} differs from fastweights at {case.shape}: {error:.1e}")
        made[name] = peer
    return made


def relative_error(given: Tensor, expected: Tensor) -> float:
    """RMS(given − expected) / RMS(expected)."""
    difference = given.double() - expected.double()
    return (difference.square().mean() / expected.double().square().mean()).sqrt().item()


def errors_of(case: Case, inputs: Inputs) -> dict[str, float]:
    """How far the case's results lie from those of the same inputs in fp64."""
    exact = inputs.to(torch.float64)
    if case.kind == "forward":
        return {"o": relative_error(forward(case.rule, inputs)(), forward(case.rule, exact)())}
    got = forward_and_backward(case.rule, inputs)()
    wanted = forward_and_backward(case.rule, exact)()
    names = INPUTS[case.rule]
    return {f"d{n}": relative_error(*pair) for n, *pair in zip(names, got, wanted, strict=True)}


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
    if case.kind == "memory":
        return measure_memory(case, samples)
    inputs = Inputs.random(case.shape, case.dtype)
    calls = {"fastweights": bound(case, inputs)}
    for name, peer in peers_of(case, inputs).items():
        calls[name] = bound(case, inputs, peer)
    if case.rule in BESIDE_GATED:
        calls["gated_delta_rule"] = bound(replace(case, rule="gated_delta_rule"), inputs)
    row = row_of(case, alternate(calls, samples))
    if case.rule in BESIDE_GATED:
        row["times_of_gated_delta_rule"] = 1 / row["peers"]["gated_delta_rule"]["ratio"]
    if case.kind == "forward":
        row["gflop_per_second"] = case.shape.forward_flop / row["seconds_median"] / 1e9
        row["share_of_peak"] = row["gflop_per_second"] * 1e9 / flop_per_second
    if case.dtype != torch.float32:
        row["errors"] = errors_of(case, inputs)
    return row


def measure_memory(case: Case, samples: int) -> Row:
    """Peak memory of forward and backward beyond the inputs, each call in a process of its own."""
    shape = (case.shape.batch, case.shape.tokens, case.shape.heads, case.shape.size)
    program = Path(__file__).with_name("memory.py")
    peaks: dict[str, list[int]] = {}
    for name in ["fastweights", *peer_names(case)]:
        sizes = (str(number) for number in (*shape, case.threads))
        command = [sys.executable, str(program), name, case.rule, *sizes]
        runs = (subprocess.run(command, check=True, capture_output=True) for _ in range(samples))
        peaks[name] = [int(run.stdout) for run in runs]
    ours = peaks.pop("fastweights")
    peers = {
        name: {"bytes": theirs, "ratio": statistics.median(theirs) / statistics.median(ours)}
        for name, theirs in peaks.items()
    }
    return description(case) | {
        "bytes": ours,
        "bytes_median": statistics.median(ours),
        "peers": peers,
    }


def measure_decoding(case: Case, samples: int) -> Row:
    """The recurrent form in place, beside a copy of the state, which is of the case's type."""
    shape = case.shape
    inputs = Inputs.random(shape)
    sizes = (shape.batch, shape.heads, shape.size, shape.size)
    state = torch.zeros(sizes, dtype=case.dtype)
    target = torch.empty_like(state)

    def decode() -> Tensor:
        return ops.gated_delta_rule_recurrent_(
            inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, state
        )

    times = alternate({"fastweights": decode, "copy": lambda: target.copy_(state)}, samples)
    row = row_of(case, times)
    row["times_of_a_copy"] = 1 / row["peers"]["copy"]["ratio"]
    if case.dtype != torch.float32:
        row["state_bytes"] = state.nbytes
    return row


def description(case: Case) -> Row:
    return {
        "rule": case.rule,
        "shape": vars(case.shape),
        "threads": case.threads,
        "kind": case.kind,
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def row_of(case: Case, times: dict[str, list[float]]) -> Row:
    ours = times.pop("fastweights")
    return description(case) | {
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
    print(f"{'rule':24}{'shape':26}{'pass':26}{'thr':>4}{'ms':>10}{'peak':>7}  peers")
    for row in rows:
        share = f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else ""
        notes = [f"{peer['ratio']:.2f}x {name}" for name, peer in row["peers"].items()]
        if "errors" in row:
            notes.append(f"error {max(row['errors'].values()):.1e}")
        kind = row["kind"] + ("" if row["dtype"] == "float32" else " " + row["dtype"])
        size = f"{row['bytes_median'] / 2**20:.1f} MiB" if "bytes_median" in row else ""
        print(
            f"{row['rule']:24}{Shape(**row['shape'])!s:26}{kind:26}{row['threads']:>4}"
            f"{size or format(row['seconds_median'] * 1e3, '.3f'):>10}{share:>7}  "
            + ", ".join(notes)
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
    parser.add_argument("--kinds", nargs="+", help="forward, forward+backward, decode, memory")
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
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)} (see --install-peers)")
    program = find_machine_limits(arguments.machine_limits)
    limits = {count: [machine_limits(program, count)] for count in arguments.threads}
    rows = []
    chosen = [
        case
        for case in cases(arguments.threads)
        if (not arguments.only or case.rule in arguments.only)
        and (not arguments.kinds or case.kind in arguments.kinds)
    ]
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
    print(f"written: {arguments.output.name}")
    if not (arguments.only or arguments.kinds):
        picture = arguments.output.with_suffix(".png")
        plot([r for r in rows if "rule" in r], picture)
        print(f"written: {picture.name}")


if __name__ == "__main__":
    main()
