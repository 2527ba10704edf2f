"""The study as a picture: what is kept by age, what happens to the base text, and the matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .facts import FACTS_PER_SET
from .measures import retention
from .report import Row, by_learner


def save_plot(rows: list[Row], path: Path) -> None:
    """Writes a PNG."""
    groups = by_learner(rows)
    sets = len(rows[0]["accuracy"])
    columns = 4
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(13, 6 + 2.6 * lines), layout="constrained")
    grid = figure.add_gridspec(2 + lines, columns, height_ratios=[2, 0.5, *([1] * lines)])
    styles = _styles(list(groups))
    upper = figure.add_subplot(grid[0, :2])
    _retention(upper, groups, styles)
    _drift(figure.add_subplot(grid[0, 2:]), groups, styles)
    key = figure.add_subplot(grid[1, :])
    key.axis("off")
    handles, labels = upper.get_legend_handles_labels()
    key.legend(handles, labels, fontsize=8, ncols=4, loc="center", handlelength=3.5)
    matrices = []
    for index, (name, group) in enumerate(groups.items()):
        axes = figure.add_subplot(grid[2 + index // columns, index % columns])
        matrices.append(axes)
        mean = np.mean([row["accuracy"] for row in group], axis=0)
        image = axes.imshow(mean, vmin=1 / FACTS_PER_SET, vmax=1, cmap="viridis")
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(sets), [str(i + 1) for i in range(sets)], fontsize=7)
        axes.set_yticks(range(sets), [str(i + 1) for i in range(sets)], fontsize=7)
        if index % columns == 0:
            axes.set_ylabel("after set", fontsize=8)
    figure.colorbar(image, ax=matrices, label="accuracy on the set", shrink=0.6)
    seeds = sorted({len(group) for group in groups.values()})
    number = "one seed" if seeds == [1] else f"mean of {' to '.join(map(str, seeds))} seeds"
    figure.suptitle(f"{sets} sets of {FACTS_PER_SET} facts, one after the other; {number}")
    figure.savefig(path, dpi=120)


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    colours = ["#1b6ca8", "#e08e0b", "#c8553d", "#5b8c5a", "#7b4fa3", "#3aa6a0", "#8a6d3b"]
    controls = [name for name in names if "shuffled" in name or "random" in name]
    shown = [name for name in names if name not in controls]
    styles: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(shown):
        dash = "-" if index < len(colours) else "--"
        styles[name] = {"color": colours[index % len(colours)], "linestyle": dash, "marker": "o"}
    for index, name in enumerate(controls):
        styles[name] = {"color": "#999999", "linestyle": ["-", "--", ":"][index % 3]}
    return styles


def _retention(axes: Axes, groups: dict[str, list[Row]], styles: dict[str, dict[str, Any]]) -> None:
    for name, group in groups.items():
        curves = np.array([retention(np.array(row["accuracy"])) for row in group])
        axes.plot(curves.mean(0), label=name, markersize=3, **styles[name])
    axes.axhline(1 / FACTS_PER_SET, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel("sets learned since")
    axes.set_ylabel("right name chosen")
    axes.set_ylim(0, 1.03)
    axes.set_title("What is kept (dotted: guessing)")


def _drift(axes: Axes, groups: dict[str, list[Row]], styles: dict[str, dict[str, Any]]) -> None:
    for name, group in groups.items():
        curves = np.array([row["base_bits"] for row in group]).mean(0)
        axes.plot(curves - curves[0], markersize=3, **styles[name])
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("sets learned")
    axes.set_ylabel("bits per byte more than at first")
    axes.set_title("What becomes of the text it knew")
