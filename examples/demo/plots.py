"""The figures as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from intervals import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import interval_text, label_of, part_label

Figures = dict[str, Any]
COLOURS = ["#1b6ca8", "#7b4ea3", "#e08e0b", "#c8553d", "#6b6b6b", "#a8a8a8", "#5b8c5a"]


def save_plot(figures: Figures, path: Path) -> None:
    """Bits per byte along the text, their differences, recall by distance, and what was taught."""
    figure = Figure(figsize=(9, 15.5), layout="constrained")
    grid = figure.add_gridspec(4, 2, height_ratios=[3, 3, 2.5, 2.3])
    text = figures["text"]
    figure.suptitle(f"{text['name']}: {text['bytes']:,} bytes read with {figures['model']['path']}")
    for row, draw in enumerate((_along, _costs, _recall)):
        draw(figure.add_subplot(grid[row, :]), figures)
    _taught(figure.add_subplot(grid[3, 0]), figures)
    _consolidated(figure.add_subplot(grid[3, 1]), figures)
    figure.savefig(path, dpi=130)


def _colour(figures: Figures, name: str) -> str:
    return COLOURS[list(figures["bits_per_byte"]).index(name) % len(COLOURS)]


def _smooth(sums: Array, counts: Array, width: int) -> Array:
    """Running mean of sums / counts over `width` neighbours, over fewer at the ends."""
    kernel = np.ones(min(width, len(sums)))
    return np.convolve(sums, kernel, "same") / np.convolve(counts, kernel, "same")


def _window_counts(figures: Figures) -> Array:
    size, window = figures["text"]["bytes"], figures["model"]["window"]
    counts = np.full(-(-size // window), float(window))
    counts[-1] = size - window * (len(counts) - 1)
    return counts


def _kilobytes(figures: Figures) -> Array:
    return np.cumsum(_window_counts(figures)) / 1000


def _block(figures: Figures) -> int:
    boot = figures["bootstrap"]
    return int(boot["block_bytes"] // boot["window_bytes"])


def _along(axes: Axes, figures: Figures) -> None:
    counts, width = _window_counts(figures), _block(figures)
    samples = figures["samples"]
    for name, sums in samples["window_bits"].items():
        smooth = _smooth(np.array(sums), counts, width)
        bits = figures["bits_per_byte"][name]
        axes.plot(
            _kilobytes(figures),
            smooth,
            color=_colour(figures, name),
            label=f"{label_of(name)}: {bits:.3f}",
        )
    piece = figures["ppmd"]["piece_bytes"]
    for name, sums in samples["ppmd_piece_bits"].items():
        sizes = np.full(len(sums), float(piece))
        sizes[-1] = figures["text"]["bytes"] - piece * (len(sums) - 1)
        axes.plot(
            np.cumsum(sizes) / 1000,
            _smooth(np.array(sums), sizes, max(1, width * figures["model"]["window"] // piece)),
            color=_colour(figures, name),
            linestyle=":",
            label=f"{label_of(name)}: {figures['bits_per_byte'][name]:.3f}",
        )
    axes.set(
        xlabel="kilobytes read",
        ylabel="bits per byte",
        title="Bits per byte along the text (running mean over "
        f"{figures['bootstrap']['block_bytes']} bytes)",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _costs(axes: Axes, figures: Figures) -> None:
    counts, width = _window_counts(figures), _block(figures)
    samples = figures["samples"]["window_bits"]
    for name, cost in figures["cost"].items():
        difference = np.array(samples[name]) - np.array(samples["carried"])
        colour = _colour(figures, name)
        axes.plot(_kilobytes(figures), _smooth(difference, counts, width), color=colour)
        if cost["low"] is not None:
            axes.axhspan(cost["low"], cost["high"], color=colour, alpha=0.2)
        axes.axhline(
            cost["estimate"],
            color=colour,
            linewidth=0.8,
            label=f"{label_of(name)}: {interval_text(cost)}",
        )
    axes.axhline(0, color="black", linewidth=0.8)
    level = figures["bootstrap"]["level"]
    axes.set(
        xlabel="kilobytes read",
        ylabel="bits per byte more than carried",
        title="What it costs more than the carried memory "
        f"(bands: {level:.0%} intervals of the mean)",
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)


def _recall(axes: Axes, figures: Figures) -> None:
    rows = figures["recall"]["by_distance"]
    names = list(figures["cost"])
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        costs = [row["costs"][name] for row in rows]
        estimate = np.array([cost["estimate"] for cost in costs])
        bounds = [[cost[side] for cost in costs] for side in ("low", "high")]
        low, high = np.array(bounds, dtype=np.float64)  # NaN where there is no interval
        axes.bar(
            np.arange(len(rows)) + (i - (len(names) - 1) / 2) * width,
            estimate,
            0.92 * width,
            yerr=np.nan_to_num([estimate - low, high - estimate]),
            color=_colour(figures, name),
            capsize=2,
            label=label_of(name),
        )
    axes.set_xticks(range(len(rows)), [f"{row['label']}\n{row['words']} words" for row in rows])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="bytes back to where the same word stood last",
        ylabel="bits per word more than carried",
        title="Recall by distance (words that are none of the commonest)",
    )
    if rows:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="y")


def _taught(axes: Axes, figures: Figures) -> None:
    labels = ["before", "false one\nread", "feedback\n0", "corrected"]
    lines = {"carried": (":", "memory"), "store": ("-", "memory, store")}
    for which, colour in (("false", "#c8553d"), ("true", "#5b8c5a")):
        for name, (line, label) in lines.items():
            steps = figures["feedback"]["sessions"][name]["steps"].values()
            bits = [step[which]["bits_per_byte"] for step in steps]
            axes.plot(labels, bits, line, marker="o", color=colour, label=f"{which}: {label}")
    axes.set(ylabel="bits per byte", title="A planted false sentence and the true one")
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=7, loc="upper center", ncols=2)
    axes.grid(alpha=0.3)


def _consolidated(axes: Axes, figures: Figures) -> None:
    consolidation = figures["consolidation"]
    axes.set_title("A model made of half of the text")
    if not consolidation["accepted"]:
        axes.text(0.5, 0.5, "not accepted", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    parts = list(consolidation["before"])
    bits = {when: [consolidation[when][part] for part in parts] for when in ("before", "after")}
    rows = range(len(parts))
    axes.hlines(rows, bits["before"], bits["after"], color="#a8a8a8", linewidth=2)
    for when, colour, above in (("before", "#6b6b6b", True), ("after", COLOURS[0], False)):
        axes.plot(bits[when], rows, "o", color=colour, label=when)
        for row, value in zip(rows, bits[when], strict=True):
            axes.annotate(
                f"{value:.3f}",
                (value, row),
                xytext=(0, 5 if above else -12),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontsize=7,
            )
    axes.set_yticks(rows, [part_label(figures, part).replace(", ", ",\n") for part in parts])
    axes.tick_params("y", labelsize=7)
    axes.set_ylim(len(parts) + 0.2, -0.6)
    axes.margins(x=0.15)
    axes.set_xlabel("bits per byte, fresh session")
    axes.legend(fontsize=7, loc="lower center", ncols=2)
    axes.grid(alpha=0.3, axis="x")
