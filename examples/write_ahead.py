"""Writes the same text one token at a time and with tokens guessed ahead, and compares.

    PYTHONPATH=build/release/python python examples/write_ahead.py book.txt

The session reads the beginning of a book, then a passage of it for the second time, and goes on
from there. With an exact store it tells the passage again, and look-up guesses most of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import fastweights
from fastweights import Session

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="a text of at least 4000 bytes")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--read", type=int, default=60_000, metavar="BYTES", help="of it at most")
    parser.add_argument("--bytes", type=int, default=400, help="to write")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ahead", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--no-store", action="store_true", help="without the exact store")
    return parser.parse_args()


def write(
    session: Session, arguments: argparse.Namespace, ahead: int
) -> tuple[Session, str, float]:
    """A copy of the session after writing, the text, and the seconds it took."""
    copy = session.fork()
    begin = time.perf_counter()
    text = copy.write(
        max_tokens=arguments.bytes, temperature=arguments.temperature, seed=1, ahead=ahead
    )
    return copy, text, time.perf_counter() - begin


def same_state(a: Session, b: Session) -> bool:
    """Whether all tensors of two sessions are equal."""
    ours, theirs = a.state(), b.state()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def main() -> None:
    """Reads, writes in each way, prints a line for each."""
    arguments = parse_arguments()
    try:
        text = arguments.text.read_bytes()[: arguments.read]
        model = fastweights.load_model(arguments.model)
    except OSError as error:
        sys.exit(f"write_ahead: {error}")
    if len(text) < 4000:
        sys.exit(f"write_ahead: {arguments.text} has fewer than 4000 bytes")
    session = Session(model, store=not arguments.no_store)
    session.read(text)
    passage = len(text) // 3
    session.read(b"\n" + text[passage : passage + 300])
    write(session, arguments, 0)  # warms up
    plain, expected, seconds = write(session, arguments, 0)
    print(f"one by one   {arguments.bytes / seconds:7.0f} bytes/s")
    for ahead in arguments.ahead:
        guessed, written, taken = write(session, arguments, ahead)
        if written != expected or not same_state(guessed, plain):
            sys.exit(f"write_ahead: with {ahead} ahead the text or the session differs")
        print(
            f"{ahead:3d} ahead    {arguments.bytes / taken:7.0f} bytes/s, "
            f"{seconds / taken:.2f} times as fast, the same bits"
        )
    print("\n" + expected)


if __name__ == "__main__":
    main()
