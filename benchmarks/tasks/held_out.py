"""What comparisons on held-out works share: PPMd's figures, and intervals of a mean gain."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

PPMD = Path(__file__).resolve().parents[1] / "results" / "ppmd_baseline.json"
WINDOW = 4096  # bytes of a window of the bootstrap


def ppmd_primed() -> dict[str, float]:
    """Work → the best primed figure of PPMd (benchmarks/tasks/ppmd_baseline.py)."""
    best: dict[str, float] = {}
    for row in json.loads(PPMD.read_text(encoding="utf-8"))["rows"]:
        best[row["work"]] = min(row["primed"], best.get(row["work"], row["primed"]))
    return best


def interval(difference: Tensor) -> list[float]:
    """95% of the mean difference: a bootstrap over windows, since neighbouring bytes are alike."""
    windows = [difference[begin : begin + WINDOW] for begin in range(0, len(difference), WINDOW)]
    sums = torch.stack([window.sum() for window in windows]).double()
    sizes = torch.tensor([len(window) for window in windows]).double()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (10000, len(sums)), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return [round(x, 4) for x in means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()]
