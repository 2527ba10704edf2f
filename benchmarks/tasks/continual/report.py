"""The study's rows as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .measures import backward_transfer, forgetting, kept, learned, mean_and_error

Row = dict[str, Any]


def by_learner(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Learner → its rows, one for each seed, in the order in which learners first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["learner"], []).append(row)
    return groups


def summary(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Measure → mean and standard error over the seeds of one learner."""
    matrices = [np.array(row["accuracy"]) for row in rows]
    return {
        "learned": mean_and_error([learned(r) for r in matrices]),
        "kept": mean_and_error([kept(r) for r in matrices]),
        "backward transfer": mean_and_error([backward_transfer(r) for r in matrices]),
        "forgetting": mean_and_error([forgetting(r) for r in matrices]),
        "answer bits": mean_and_error(
            [float(np.mean(np.diag(row["answer_bits"]))) for row in rows]
        ),
        "drift": mean_and_error([row["base_bits"][-1] - row["base_bits"][0] for row in rows]),
        "seconds": mean_and_error([row["seconds_learning"] for row in rows]),
    }


def table(rows: Iterable[Row]) -> str:
    """Markdown: a row for each learner."""
    lines = [
        "| learner | seeds | right after learning | at the end | backward transfer | forgetting "
        "| right name, bits | base text, bits per byte | seconds learning |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in by_learner(rows).items():
        s = summary(group)

        def cell(key: str, form: str, s: dict[str, tuple[float, float]] = s) -> str:
            mean, error = s[key]
            return f"{mean:{form}} ± {error:.2f}"

        cells = [
            str(len(group)),
            cell("learned", ".2f"),
            cell("kept", ".2f"),
            cell("backward transfer", "+.2f"),
            cell("forgetting", ".2f"),
            cell("answer bits", ".1f"),
            cell("drift", "+.3f"),
            f"{s['seconds'][0]:.1f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
