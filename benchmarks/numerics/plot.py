"""Draws the errors that accuracy.py measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw(rows: list[Row], path: Path) -> None:
    """Left: fp32 errors by regime, one mark a rule. Right: the state's error along a long run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 5.6), width_ratios=(3, 2), layout="constrained"
    )
    draw_regimes(left, [row for row in rows if row["kind"] == "regime"])
    draw_long_runs(right, [row for row in rows if row["kind"] == "long"])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_regimes(axes: Any, rows: list[Row]) -> None:
    """Outputs, states and the worst gradient of each rule, fp32 against the library in fp64."""
    shown = [row for row in rows if row["dtype"] == "float32" and row["against"] == "fp64"]
    shown = [row for row in shown if not row["regime"].startswith("denormal")]
    regimes = list(dict.fromkeys(row["regime"] for row in shown))
    rules = list(dict.fromkeys(row["rule"] for row in shown))
    kinds = {"o": ("o", "o", -0.2), "state": ("s", "final state", 0.0)}
    for name, (marker, label, shift) in kinds.items():
        points = [(regimes.index(row["regime"]), row["rule"], row["errors"][name]) for row in shown]
        scatter(axes, rules, points, marker, shift, label)
    points = [
        (
            regimes.index(row["regime"]),
            row["rule"],
            max(error for name, error in row["errors"].items() if name.startswith("d_")),
        )
        for row in shown
    ]
    scatter(axes, rules, points, "^", 0.2, "worst gradient")
    axes.axhline(1e-5, color="grey", linestyle=":", label="tolerance, outputs and state")
    axes.axhline(1e-4, color="grey", linestyle="--", label="tolerance, gradients")
    axes.set_yscale("log")
    axes.set_xticks(range(len(regimes)), regimes, rotation=40, ha="right")
    axes.set_ylabel("RMS(error) / RMS(fp64)")
    axes.set_title("fp32 by regime; one mark for each rule (exact results are not shown)")
    axes.set_ylim(1e-8, 1e-3)
    axes.legend(loc="upper left", fontsize=8, ncols=2)


def scatter(
    axes: Any, rules: list[str], points: Any, marker: str, shift: float, label: str
) -> None:
    """Points by rule: (regime, rule, error). A log scale has no place for 0."""
    step = 0.16 / max(len(rules), 1)
    placed = [(x + shift + step * rules.index(rule), y) for x, rule, y in points if y > 0]
    axes.scatter(*zip(*placed, strict=True), marker=marker, s=11, label=label, alpha=0.8)


def draw_long_runs(axes: Any, rows: list[Row]) -> None:
    """One line for each rule and regime, fp32."""
    shown = [row for row in rows if row["dtype"] == "float32"]
    styles = {"ordinary": "-", "gate -1e-6": "--", "beta 2": "-.", "gate 0": ":"}
    rules = list(dict.fromkeys(row["rule"] for row in shown))
    for row in shown:
        style = styles.get(row["regime"], (0, (1, 3)))
        label = f"{row['rule']}, {row['regime']}"
        color = f"C{rules.index(row['rule'])}"
        axes.plot(row["tokens"], row["state"], linestyle=style, color=color, label=label)
    axes.axhline(1e-5, color="grey", linestyle=":", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens in one call")
    axes.set_ylabel("RMS(error) / RMS(fp64) of the state")
    axes.set_title("fp32 along a million tokens")
    axes.set_ylim(2e-8, 1e1)
    axes.legend(fontsize=6.5, loc="upper left", ncols=2)
