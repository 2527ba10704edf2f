"""Measures what a state in bf16 costs: how far it and the outputs lie from fp64, by tokens.

A call that is given a state in bf16 rounds it once, when it ends. So the same tokens are read one
to a call, as in decoding, and 64 to a call. tables.py takes the table of docs/numerics.md from the
JSON file.

    PYTHONPATH=build/release/python python benchmarks/numerics/narrow_states.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "python")]
from accuracy import rounded, slice_tokens
from comparison import relative_error  # type: ignore[import-not-found]
from regimes import (  # type: ignore[import-not-found]
    Regime,
    Sizes,
    call,
    calls,
    make,
    widened,
)

from record import Record, save_record

RESULT = ROOT / "benchmarks" / "results" / "accuracy_narrow_states.json"
RULES = ("delta_rule", "gated_delta_rule", "kda", "rwkv7", "momentum_delta_rule")
REGIMES = ("ordinary", "gate -1e-6")
GATHERING = ("linear_attention", "gate 0")  # nothing is overwritten, nothing decays
SIZES = Sizes(tokens=10_000, value_heads=1, key_size=64, value_size=64)
MARKS = (10, 100, 1_000, 10_000)
WINDOW = 10  # tokens before a mark whose outputs are compared there
PIECES = (1, 64)  # tokens of a call

Row = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def states_of(results: Tensors) -> Tensors:
    """The states that a call returned, as the next one takes them."""
    names = {"state": "initial_state", "momentum": "initial_momentum"}
    return {names[name]: results[name] for name in names if name in results}


def read(rule: str, x: Tensors, end: int, piece: int) -> Tensors:
    """The outputs, and the states after `end` tokens, `piece` to a call."""
    carried = {name: tensor for name, tensor in x.items() if name.startswith("initial")}
    outputs, results = [], {}
    for begin in range(0, end, piece):
        results = call(rule, slice_tokens(x, begin, min(end, begin + piece)) | carried)
        carried = states_of(results)
        outputs.append(results["o"])
    return results | {"o": torch.cat(outputs, 1)}


def row(rule: str, regime: Regime, piece: int) -> Row:
    """Errors of one rule at each mark."""
    x = make(rule, regime, torch.float32, SIZES, reading_key=False)
    narrow = {
        name: tensor.bfloat16() if name.startswith("initial") else tensor
        for name, tensor in x.items()
    }
    wide = widened(narrow)
    outputs, states = [], []
    for mark in MARKS:
        given = read(rule, narrow, mark, piece)
        exact = call(rule, slice_tokens(wide, 0, mark))
        window = slice(max(mark - WINDOW, 0), mark)
        outputs.append(rounded(relative_error(given["o"][:, window], exact["o"][:, window])))
        states.append(rounded(relative_error(given["state"], exact["state"])))
    return {
        "kind": "narrow",
        "rule": rule,
        "regime": regime.name,
        "piece": piece,
        "tokens": list(MARKS),
        "o": outputs,
        "state": states,
    }


def rows() -> Iterator[Row]:
    """Every rule and regime, by tokens of a call."""
    wanted = [
        (rule, regime)
        for rule, regime in calls()
        if (rule in RULES and regime.name in REGIMES) or (rule, regime.name) == GATHERING
    ]
    for rule, regime in tqdm(wanted, desc="states in bf16"):
        for piece in PIECES:
            with torch.no_grad():
                yield row(rule, regime, piece)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # calls this small would spend their time waiting for each other
    save_record(options.output, Record("Errors of states in bf16 against fp64", list(rows())))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
