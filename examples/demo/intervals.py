"""Confidence intervals for means over a text, whose neighbouring windows are correlated."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST_BLOCKS = 5


class Interval(NamedTuple):
    """An estimate, and its bounds at the level LEVEL; NaN if there are too few data."""

    estimate: float
    low: float
    high: float


def _bounds(resampled: Array) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def ratio_interval(sums: Array, counts: Array, block: int, seed: int = 0) -> Interval:
    """Circular block bootstrap (Politis and Romano, 1992) of sum(sums) / sum(counts).

    `sums[i]` and `counts[i]` belong to window i of a text. Blocks of `block` neighbouring windows
    are drawn with replacement, so that correlations within a block stay as they are.
    """
    total = counts.sum()
    estimate = float(sums.sum() / total) if total else float("nan")
    blocks = len(sums) // block
    if blocks < FEWEST_BLOCKS or not total:
        return Interval(estimate, float("nan"), float("nan"))
    starts = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, blocks))

    def block_sums(values: Array) -> Array:
        running = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[:block]]))])
        sums_from: Array = running[block:][: len(values)] - running[: len(values)]
        return sums_from

    numerators = block_sums(sums)[starts].sum(axis=1)
    denominators = block_sums(counts)[starts].sum(axis=1)
    drawn = denominators > 0
    if not drawn.any():
        return Interval(estimate, float("nan"), float("nan"))
    return Interval(estimate, *_bounds(numerators[drawn] / denominators[drawn]))


def mean_interval(values: Array, block: int, seed: int = 0) -> Interval:
    """The same for the mean of one value per window, e.g. a difference that is paired by window."""
    return ratio_interval(values, np.ones_like(values), block, seed)
