"""Times what a call of an operator costs: from C++ beside its kernel, and from Python.

The C++ half is the program call_overhead (built where Google Benchmark is found). One thread; the
figures go to benchmarks/results/speed_calls.json.

    cmake --build build/release --target call_overhead fastweights_python
    PYTHONPATH=build/release/python python benchmarks/speed/call_overhead.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from fastweights import ops
from record import Record, save_record

RESULT = ROOT / "benchmarks" / "results" / "speed_calls.json"
PROGRAM = ROOT / "build" / "release" / "benchmarks" / "call_overhead"
SHAPES = [(1, 1, 16), (1, 16, 128)]  # tokens, heads, K = V
Row = dict[str, Any]


def cpp_rows(program: Path, samples: int) -> list[Row]:
    """Nanoseconds a call, kernels and operators in random turns."""
    options = [
        f"--benchmark_repetitions={samples}",
        "--benchmark_min_time=0.1",
        "--benchmark_enable_random_interleaving=true",
        "--benchmark_format=json",
    ]
    output = subprocess.run([program, *options], capture_output=True, text=True, check=True).stdout
    times: dict[str, list[float]] = {}
    for run in json.loads(output)["benchmarks"]:
        if run["run_type"] == "iteration":
            times.setdefault(run["run_name"], []).append(run["real_time"])
    return [
        {"from": "C++", "call": name, "median_ns": statistics.median(x), "samples_ns": x}
        for name, x in times.items()
    ]


def python_calls(tokens: int, heads: int, size: int) -> dict[str, Callable[[], Any]]:
    """The calls of one shape, by name."""
    q, k, v = (torch.randn(1, tokens, heads, size) for _ in range(3))
    g, beta = -torch.rand(1, tokens, heads), torch.rand(1, tokens, heads)
    state = torch.randn(1, heads, size, size)
    return {
        "operator_recurrent": lambda: ops.gated_delta_rule_recurrent_(
            q, k, v, g, beta, state, use_qk_l2norm=True
        ),
        "operator_chunkwise": lambda: ops.gated_delta_rule(
            q, k, v, g, beta, None, state, output_final_state=True, use_qk_l2norm=True
        ),
        "torch.add of two scalars": lambda: torch.add(g, beta),
    }


def python_rows(samples: int) -> list[Row]:
    """Nanoseconds a call through the package's own functions."""
    rows = []
    for tokens, heads, size in SHAPES:
        for name, call in python_calls(tokens, heads, size).items():
            count = timeit.Timer(call).autorange()[0]
            times = [x / count * 1e9 for x in timeit.repeat(call, number=count, repeat=samples)]
            label = f"{name}/T:{tokens}/H:{heads}/K:{size}"
            median = statistics.median(times)
            rows.append({"from": "Python", "call": label, "median_ns": median, "samples_ns": times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = cpp_rows(arguments.program, arguments.samples) + python_rows(arguments.samples)
    for row in rows:
        print(f"{row['from']:7} {row['call']:40} {row['median_ns']:10.0f} ns")
    save_record(arguments.output, Record("What a call of an operator costs", rows))


if __name__ == "__main__":
    main()
