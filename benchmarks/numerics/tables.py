#!/usr/bin/env python3
"""Fill the tables of docs/numerics.md, between their marks, from benchmarks/results/accuracy*.json.

benchmarks/numerics/tables.py           write docs/numerics.md
benchmarks/numerics/tables.py --check   change nothing; fail if docs/numerics.md is out of date
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "numerics.md"
RESULT = ROOT / "benchmarks" / "results" / "accuracy.json"
NARROW = ROOT / "benchmarks" / "results" / "accuracy_narrow_states.json"
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Row = dict[str, Any]
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
GATES = ("d_g", "d_w", "d_beta", "d_mu", "d_eta")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def short(error: float) -> str:
    """Two digits: 1.3e-07 → 1.3e-7; what is exact is 0."""
    if error == 0:
        return "0"
    return re.sub(r"e([+-])0*(\d)", lambda m: f"e{m[1].replace('+', '')}{m[2]}", f"{error:.1e}")


def worst(row: Row, kind: str, field: str = "errors") -> float:
    """The largest error of a row's outputs, states, gradients, or gradients of gates."""
    kinds: dict[str, Callable[[str], bool]] = {
        "o": lambda name: name == "o",
        "state": lambda name: name in ("state", "momentum"),
        "gradients": lambda name: name.startswith("d_") and name not in GATES,
        "gates": lambda name: name in GATES,
        "all gradients": lambda name: name.startswith("d_"),
    }
    return max((error for name, error in row[field].items() if kinds[kind](name)), default=0.0)


def of_kind(rows: list[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == fields[name] for name in fields)]


def unique(rows: list[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def rules_table(rows: list[Row]) -> str:
    """Every rule and type with ordinary numbers, and its worst regime."""
    body = []
    measured = of_kind(rows, kind="regime", against="fp64")
    for rule in unique(measured, "rule"):
        for dtype in unique(measured, "dtype"):
            mine = of_kind(measured, rule=rule, dtype=dtype)
            (ordinary,) = of_kind(mine, regime="ordinary")
            normal = [row for row in mine if "units" not in row]
            extreme = max(normal, key=lambda row: max(worst(row, "o"), worst(row, "state")))
            size = max(worst(extreme, "o"), worst(extreme, "state"))
            cells = [short(worst(ordinary, kind)) for kind in ("o", "state", "gradients", "gates")]
            body.append([f"`{rule}`", NAMES[dtype], *cells, f"{short(size)} ({extreme['regime']})"])
    header = ["rule", "inputs", "o", "state", "gradients", "of gates", "worst o or state (regime)"]
    return table(header, body)


def regimes_table(rows: list[Row]) -> str:
    """Every regime, the worst of all rules."""
    measured = of_kind(rows, kind="regime", against="fp64")
    measured = [row for row in measured if "units" not in row]
    header = ["regime", "what it is"]
    kinds = ("o", "state", "all gradients")
    for dtype in ("fp32", "bf16"):
        header += [f"{dtype}: o", "state", "gradients"]
    body = []
    for regime in unique(measured, "regime"):
        mine = of_kind(measured, regime=regime)
        cells = [
            short(max(worst(row, kind) for row in of_kind(mine, dtype=dtype)))
            for dtype in ("float32", "bfloat16")
            for kind in kinds
        ]
        body.append([regime, mine[0]["meaning"], *cells])
    return table(header, body)


def denormals_table(rows: list[Row]) -> str:
    """Errors in units of the type's smallest number, the worst of all rules."""
    measured = [row for row in of_kind(rows, kind="regime", against="fp64") if "units" in row]
    body = []
    for regime in unique(measured, "regime"):
        for dtype in unique(measured, "dtype"):
            mine = of_kind(measured, regime=regime, dtype=dtype)
            steps = {
                kind: f"{max(worst(row, kind, 'units') for row in mine):.2g}"
                for kind in ("o", "state")
            }
            if dtype == "float16":  # whose smallest numbers are ordinary ones to an fp32 state
                relative = short(max(worst(row, "state") for row in mine))
                steps["state"] = f"(relative) {relative}"
            cells = list(steps.values())
            body.append([f"{regime}: {mine[0]['meaning']}", NAMES[dtype], *cells])
    return table(["regime", "inputs", "o", "state"], body)


def long_table(rows: list[Row]) -> str:
    """The state's error along a million tokens, and that of the last outputs."""
    runs = of_kind(rows, kind="long")
    marks = [f"{tokens:,}" for tokens in runs[0]["tokens"]]
    body = [
        [
            f"`{row['rule']}`",
            NAMES[row["dtype"]],
            row["regime"],
            *(short(error) for error in row["state"]),
            short(row["o"][-1]),
        ]
        for row in runs
    ]
    return table(["rule", "inputs", "regime", *marks, "o at the end"], body)


def oracle_table(rows: list[Row]) -> str:
    """Against the oracle: the worst of all rules in each regime but the denormal ones, by type."""
    measured = of_kind(rows, kind="regime", against="oracle")
    measured = [row for row in measured if "units" not in row]
    body = []
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        mine = of_kind(measured, dtype=dtype)
        cells = [
            short(max(worst(row, kind) for row in mine))
            for kind in ("o", "state", "gradients", "gates")
        ]
        body.append([NAMES[dtype], *cells])
    return table(["inputs", "o", "state", "gradients", "of gates"], body)


def narrow_table(rows: list[Row]) -> str:
    """A state in bf16: its error along ten thousand tokens, and that of the last outputs."""
    runs = of_kind(rows, kind="narrow")
    marks = [f"{tokens:,}" for tokens in runs[0]["tokens"]]
    body = [
        [
            f"`{row['rule']}`",
            row["regime"],
            str(row["piece"]),
            *(short(error) for error in row["state"]),
            short(row["o"][-1]),
        ]
        for row in runs
    ]
    return table(["rule", "regime", "tokens a call", *marks, "o at the end"], body)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "rules": rules_table,
    "regimes": regimes_table,
    "denormals": denormals_table,
    "long": long_table,
    "oracle": oracle_table,
    "narrow": narrow_table,
}


def filled(page: str, result: Row) -> str:
    """The page with its tables, and where they come from."""
    page = MARKS.sub(lambda m: f"{m[1]}{TABLES[m[2]](result['rows'])}\n{m[3]}", page)
    machine = result["machine"]
    source = (
        f"<!-- source -->\nMeasured on {machine['processor']} ({machine['instruction_set']}, torch "
        f"{machine['torch']}) at commit {result['commit']} by `{result['command']}`.\n"
        "<!-- /source -->"
    )
    return re.sub(r"<!-- source -->.*?<!-- /source -->", lambda _: source, page, flags=re.DOTALL)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    check: bool = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    result["rows"] += json.loads(NARROW.read_text(encoding="utf-8"))["rows"]
    new = filled(old, result)
    if new == old:
        print("docs/numerics.md is up to date")
        return
    if check:
        sys.exit("docs/numerics.md is out of date: run benchmarks/numerics/tables.py")
    partial = PAGE.with_name(PAGE.name + ".partial")
    partial.write_text(new, encoding="utf-8")
    os.replace(partial, PAGE)
    print("docs/numerics.md was brought up to date")


if __name__ == "__main__":
    main()
