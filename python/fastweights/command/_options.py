"""Options that several commands have, and what they stand for."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .. import _C
from ..errors import Error
from ..io import load_model
from ..session import Session

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]

SHIPPED = Path("models") / "reader"


def add_command(commands: Commands, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A command with the options that all have."""
    result = commands.add_parser(name, help=text.partition(".")[0], description=text)
    result.set_defaults(run=run)
    result.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="model folder (default: $FASTWEIGHTS_MODEL, else models/reader here or beside the "
        "library's sources)",
    )
    result.add_argument(
        "--threads", type=positive, metavar="N", help="processor cores to use (default: all)"
    )
    return result


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


positive.__name__ = "whole number"  # argparse names the type by it


def open_model(arguments: argparse.Namespace) -> _C.LanguageModel:
    """The model that is asked for.

    Raises:
        Error: none was named, and there is none where one is looked for.
        FileError, StateMismatch: its files are missing or malformed.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return load_model(arguments.model or _default_model()).native()


def _default_model() -> Path:
    named = os.environ.get("FASTWEIGHTS_MODEL")
    if named:
        return Path(named)
    sources = Path(__file__).resolve().parents[3]
    for folder in (SHIPPED, sources / SHIPPED):
        if (folder / "config.json").exists():
            return folder
    raise Error(f"there is no model in {SHIPPED}: name its folder with --model")


def open_state(path: Path, model: _C.LanguageModel) -> Session:
    """The session in a state file, which must be there."""
    return Session.load(path, model)


def read_bytes(path: Path) -> bytes:
    """A file, or for `-` the standard input.

    Raises:
        Error: there is nothing in it.
    """
    text = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    if not text:
        raise Error(f"{'standard input' if str(path) == '-' else path} is empty")
    return text


def print_table(rows: list[list[Any]]) -> None:
    """Columns as wide as they need to be: the first to the left, the others to the right."""
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        line = first.ljust(widths[0])
        for cell, width in zip(others, widths[1:], strict=True):
            line += "  " + cell.rjust(width)
        print(line.rstrip())
