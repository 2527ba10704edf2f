"""Measures how far every rule lies from fp64, by type and by regime, and along a million tokens.

An error is RMS(given − fp64) / RMS(fp64) over a whole tensor. The reference reads the very numbers
that the rule reads: inputs of 16 bits are rounded first, and the rounded ones widened. There are
two references: at short lengths the oracle of the tests, token by token with gradients by autograd,
which shares no code with the library; at longer ones the library's own fp64 form, which the first
comparison covers. Everything goes into one JSON file with a plot beside it; tables.py takes the
tables of docs/numerics.md from there.

    cmake --build build/release --target fastweights_python
    PYTHONPATH=build/release/python python benchmarks/numerics/accuracy.py
    … accuracy.py --only kda --without-long-run --output /tmp/kda.json
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "python")]
from comparison import relative_error, rms, smallest  # type: ignore[import-not-found]
from plot import draw
from regimes import (  # type: ignore[import-not-found]
    RULES,
    Regime,
    Sizes,
    call,
    calls,
    expected,
    make,
    widened,
    with_gradients,
)

from record import Record, save_record

RESULT = ROOT / "benchmarks" / "results" / "accuracy.json"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REFERENCE_REGIMES = ("ordinary", "gates mixed")  # where fp64 itself meets the oracle
SHORT = Sizes(tokens=64, value_heads=2, key_size=32, value_size=32)
LONGER = Sizes(tokens=1000, value_heads=2, key_size=64, value_size=64)
MILLION = Sizes(tokens=1_000_000, value_heads=1, key_size=64, value_size=64)
MARKS = (1_000, 10_000, 100_000, 1_000_000)
WINDOW = 1_000  # tokens before a mark whose outputs are compared there
PIECE = 100_000  # the fp64 reference goes along in pieces, for the sake of memory
IN_BFLOAT16 = ("gated_delta_rule", "kda")  # whose long runs have 16-bit inputs too

Row = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def rounded(x: float) -> float:
    """Three significant digits are more than an error has."""
    return float(f"{x:.3g}")


# ---- regimes -----------------------------------------------------------------------------------


def errors_of(given: Tensors, exact: Tensors) -> Row:
    """The relative error of each tensor; as well in units of its type's smallest number."""
    relative = {name: rounded(relative_error(given[name], exact[name])) for name in exact}
    units = {
        name: rounded(rms(given[name].double() - exact[name]) / smallest(given[name].dtype))
        for name in exact
    }
    return {"errors": relative, "units": units}


def against(reference: str, rule: str, regime: Regime, dtype: torch.dtype) -> Row:
    """One row: a rule in one regime and type against one reference."""
    oracle = reference == "oracle"
    sizes = SHORT if oracle else LONGER
    x = make(rule, regime, dtype, sizes)
    exact = with_gradients(expected if oracle else call, rule, widened(x), regime)
    measured = errors_of(with_gradients(call, rule, x, regime), exact)
    if not regime.name.startswith("denormal"):
        del measured["units"]
    return {
        "kind": "regime",
        "rule": rule,
        "regime": regime.name,
        "meaning": regime.meaning,
        "dtype": str(dtype).removeprefix("torch."),
        "against": reference,
        "tokens": sizes.tokens,
        **measured,
    }


def regime_rows(rules: list[str]) -> Iterator[Row]:
    """Every rule in every regime and type, against both references."""
    cases = [(rule, regime, dtype) for rule, regime in calls() for dtype in DTYPES if rule in rules]
    for rule, regime, dtype in tqdm(cases, desc="regimes"):
        if dtype != torch.float64:
            yield against("fp64", rule, regime, dtype)
        if dtype != torch.float64 or regime.name in REFERENCE_REGIMES:
            yield against("oracle", rule, regime, dtype)


# ---- a million tokens --------------------------------------------------------------------------


def _held(x: Tensors, _: torch.dtype) -> Tensors:
    return x | {"k": torch.zeros_like(x["k"]), "g": torch.full_like(x["g"], -1e-6)}


HELD = Regime(
    "gate -1e-6, nothing written", "keys are 0: the first state decays by 1/e", _held, "g"
)


@dataclass(frozen=True)
class Run:
    """One rule along a million tokens."""

    rule: str
    regime: Regime


def long_runs(rules: list[str]) -> list[Run]:
    """What is measured at length: gates near 1 are the hard ones, and reflections."""
    by_name = {regime.name: regime for _, regime in calls()} | {HELD.name: HELD}
    wanted = [("delta_rule", "ordinary"), ("delta_rule", "beta 2"), ("kda", "beta 2")]
    wanted += [(rule, "gate -1e-6") for rule in RULES[1:]]
    for rule in ("gated_delta_rule", "linear_attention", "kda"):
        wanted += [(rule, "ordinary"), (rule, HELD.name)]
    wanted += [("linear_attention", "gate 0")]
    return [Run(rule, by_name[name]) for rule, name in wanted if rule in rules]


def slice_tokens(x: Tensors, begin: int, end: int) -> Tensors:
    """The rows of tokens [begin, end); a tensor with several rows a token keeps them together."""
    tokens = x["q" if "q" in x else "r"].shape[1]
    return {
        name: tensor
        if name.startswith("initial")
        else tensor[:, begin * (tensor.shape[1] // tokens) : end * (tensor.shape[1] // tokens)]
        for name, tensor in x.items()
    }


def exact_along(rule: str, x: Tensors) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """In fp64, by mark: the outputs of the last tokens before it, and the state there."""
    tokens = MILLION.tokens
    borders = sorted({0, *MARKS, *range(PIECE, tokens, PIECE)})
    outputs, states = {}, {}
    carried: Tensors = {}
    for begin, end in itertools.pairwise(borders):
        piece = slice_tokens(x, begin, end) | carried
        results = call(rule, widened(piece))
        carried = {"initial_state": results["state"]}
        if "momentum" in results:
            carried["initial_momentum"] = results["momentum"]
        if end in MARKS:
            outputs[end], states[end] = results["o"][:, -WINDOW:].clone(), results["state"]
    return outputs, states


def long_row(run: Run, dtype: torch.dtype) -> Row:
    """Errors at each mark: outputs in one call of all tokens, the state of one that ends there."""
    x = make(run.rule, run.regime, dtype, MILLION, reading_key=False)
    exact_outputs, exact_states = exact_along(run.rule, x)
    whole = call(run.rule, x)["o"]
    outputs, states = [], []
    for mark in MARKS:
        window = whole[:, max(mark - WINDOW, 0) : mark]
        outputs.append(rounded(relative_error(window, exact_outputs[mark])))
        state = call(run.rule, slice_tokens(x, 0, mark))["state"]
        states.append(rounded(relative_error(state, exact_states[mark])))
    return {
        "kind": "long",
        "rule": run.rule,
        "regime": run.regime.name,
        "meaning": run.regime.meaning,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": list(MARKS),
        "o": outputs,
        "state": states,
    }


def long_rows(rules: list[str]) -> Iterator[Row]:
    """The long runs in fp32, some of them in bf16 too."""
    cases = [(run, torch.float32) for run in long_runs(rules)]
    cases += [(run, torch.bfloat16) for run in long_runs(rules) if run.rule in IN_BFLOAT16]
    for run, dtype in tqdm(cases, desc="a million tokens"):
        with torch.no_grad():
            yield long_row(run, dtype)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    parser.add_argument("--without-long-run", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # calls this small would spend their time waiting for each other
    rows = list(regime_rows(options.only))
    if not options.without_long_run:
        rows += long_rows(options.only)
    save_record(options.output, Record("Errors against fp64", rows))
    draw(rows, options.output.with_suffix(".png"))
    print(f"wrote {options.output} and {options.output.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
