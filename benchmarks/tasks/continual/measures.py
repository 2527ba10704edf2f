"""Measures of lifelong learning, from R[i][j]: accuracy on set j after learning set i."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def learned(r: Matrix) -> float:
    """Mean accuracy on a set right after it was learned."""
    return float(np.mean(np.diag(r)))


def kept(r: Matrix) -> float:
    """Mean accuracy on all sets at the end."""
    return float(np.mean(r[-1]))


def backward_transfer(r: Matrix) -> float:
    """Mean of R[T][i] − R[i][i] over all sets but the last; negative where old sets suffer."""
    return float(np.mean(r[-1, :-1] - np.diag(r)[:-1]))


def forgetting(r: Matrix) -> float:
    """Mean over all sets but the last of the best accuracy before the end less that at the end."""
    best = [r[j:-1, j].max() for j in range(len(r) - 1)]
    return float(np.mean(np.array(best) - r[-1, :-1]))


def retention(r: Matrix) -> list[float]:
    """Mean accuracy by the number of sets learned since."""
    return [float(np.mean(np.diag(r, -age))) for age in range(len(r))]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and its standard error."""
    array = np.array(values)
    error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else float("nan")
    return float(array.mean()), float(error)
