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
    """An estimate, and its bounds at the level LEVEL; None if there are too few data."""

    estimate: float
    low: float | None
    high: float | None


def _bounds(resampled: Array) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def ratio_interval(sums: Array, counts: Array, block: int, seed: int = 0) -> Interval:
    """Circular block bootstrap (Politis and Romano, 1992) of sum(sums) / sum(counts).

    `sums[i]` and `counts[i]` belong to window i of a text. Blocks of `block` neighbouring windows
    are drawn with replacement, so that correlations within a block stay as they are. At least one
    count must be above zero.
    """
    estimate = float(sums.sum() / counts.sum())
    blocks = len(sums) // block
    if blocks < FEWEST_BLOCKS:
        return Interval(estimate, None, None)
    starts = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, blocks))

    def block_sums(values: Array) -> Array:
        running = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[:block]]))])
        sums_from: Array = running[block:][: len(values)] - running[: len(values)]
        return sums_from

    numerators = block_sums(sums)[starts].sum(axis=1)
    denominators = block_sums(counts)[starts].sum(axis=1)
    drawn = denominators > 0
    return Interval(estimate, *_bounds(numerators[drawn] / denominators[drawn]))
