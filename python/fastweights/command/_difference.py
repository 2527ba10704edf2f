"""`diff`: where two states part."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..session import Session
from ._options import Commands, add_command, open_model, open_state, print_table

CONTEXT = 40  # bytes shown on each side
SAME, DIFFERENT = 0, 1


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "diff",
        _diff,
        "Compare two states of one model. Tells how far their logs are the same text, where they "
        "part, and how far their tensors lie apart. Exit code 0: the same, 1: they differ.",
    )
    command.add_argument("first", type=Path, metavar="FIRST", help="state file")
    command.add_argument("second", type=Path, metavar="SECOND", help="state file")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def common_prefix(first: bytes, second: bytes) -> int:
    """Bytes that two texts have in common at their start."""
    size = min(len(first), len(second))
    a, b = (np.frombuffer(text, np.uint8, size) for text in (first, second))
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else size


def distance(first: Tensor | None, second: Tensor | None) -> float | str:
    """RMS of the difference over that of the first, or why there is none."""
    if first is None or second is None:
        return "only in one"
    if first.shape != second.shape:
        return "shapes differ"
    a, b = first.double(), second.double()
    if a.equal(b):
        return 0.0
    size = a.square().mean().sqrt().item()
    error = (a - b).square().mean().sqrt().item()
    return error / size if size else float("inf")


def _text(session: Session) -> bytes:
    return b"".join(call.text for call in session.log())


def compare(first: Session, second: Session) -> dict[str, Any]:
    """The figures of `diff`."""
    texts = _text(first), _text(second)
    common = common_prefix(*texts)
    states = first.state(), second.state()
    names = dict.fromkeys([*states[0], *states[1]])
    return {
        "positions": [first.position, second.position],
        "log_bytes": [len(text) for text in texts],
        "common_bytes": common,
        "same_calls": first.log() == second.log(),
        "before": _shown(texts[0][max(0, common - CONTEXT) : common]),
        "after": [_shown(text[common : common + CONTEXT]) for text in texts],
        "distances": {name: distance(states[0].get(name), states[1].get(name)) for name in names},
    }


def _shown(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")


def is_same(figures: dict[str, Any]) -> bool:
    """Whether two sessions will go on alike."""
    return bool(figures["same_calls"]) and not any(figures["distances"].values())


def _diff(arguments: argparse.Namespace) -> int:
    model = open_model(arguments)
    paths = arguments.first, arguments.second
    figures = compare(*(open_state(path, model) for path in paths))
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        _print(paths, figures)
    return SAME if is_same(figures) else DIFFERENT


def _print(paths: tuple[Path, Path], figures: dict[str, Any]) -> None:
    for path, position, size in zip(paths, figures["positions"], figures["log_bytes"], strict=True):
        print(f"{path}: position {position}, {size} bytes in the log")
    common = figures["common_bytes"]
    if figures["same_calls"]:
        print("the logs are the same")
    elif figures["log_bytes"] == [common, common]:
        print("the logs are the same text in other calls")
    else:
        print(f"the logs have {common} bytes in common, up to {figures['before']!r}")
        for path, text in zip(paths, figures["after"], strict=True):
            print(f"  {path} goes on {text!r}" if text else f"  {path} ends there")
    print()
    print_table([["tensor", "distance"], *(list(row) for row in figures["distances"].items())])
