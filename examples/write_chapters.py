"""Writes a long structured text from an outline, and checks itself against a fact sheet.

The session reads the sheet and then writes chapter by chapter. Each chapter ends with lines that
begin facts of the sheet, in turn, and that the model completes. A judge holds everything that was
written against the sheet: what contradicts it is not learned, and the right statement is read.

    PYTHONPATH=build/release/python python examples/write_chapters.py --output story.txt

The model that ships writes in the manner of plays, and no sense: what is shown is the loop, and
that facts survive a text much longer than the model's attention window.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

import fastweights
from fastweights import Fact, JudgedPassage, Session, fact_judge, write_judged
from fastweights.judging import Judge

ROOT = Path(__file__).resolve().parents[1]

SHEET = [
    ("The steward of the castle is ", "Aldous"),
    ("The river below the walls is ", "the Wend"),
    ("The king's only daughter is ", "Ismene"),
    ("The sword above the hearth is ", "Griefmaker"),
]
OUTLINE = [
    "The steward counts the keys",
    "A rider from the river",
    "The daughter will not marry",
    "What hangs above the hearth",
    "A feast, and an empty chair",
    "The river rises",
    "The sword is taken down",
    "The steward opens the gate",
]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help='JSON: [["The river is ", "the Wend"], …]'
    )
    parser.add_argument(
        "--outline", type=Path, metavar="FILE", help="a chapter's title on each line"
    )
    parser.add_argument("--chapter-bytes", type=int, default=1600, help="of free text per chapter")
    parser.add_argument("--passage-bytes", type=int, default=400, help="judged at once")
    parser.add_argument("--candidates", type=int, default=1, help="written for each passage")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-store", action="store_true", help="fast weights alone")
    parser.add_argument("--no-judge", action="store_true", help="learn all that is written")
    parser.add_argument("--output", type=Path, help="file for the text; else it is printed")
    return parser.parse_args()


def fail(message: str) -> NoReturn:
    """Ends the program with one clear line."""
    sys.exit(f"write_chapters: {message}")


def read_text(path: Path) -> str:
    """A file of the user's."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path}: {error}")


def load_sheet(path: Path | None) -> list[tuple[str, str]]:
    """Cues and their values, from a file or those above."""
    if path is None:
        return SHEET
    try:
        pairs = [(cue, value) for cue, value in json.loads(read_text(path))]
    except (ValueError, TypeError) as error:
        fail(f"{path} is not a list of pairs of a cue and its value: {error}")
    if not pairs or not all(isinstance(part, str) and part for pair in pairs for part in pair):
        fail(f"{path} needs at least one pair of texts, none of them empty")
    return pairs


class Book:
    """A text that a session writes, and what the judge said of it."""

    def __init__(
        self, session: Session, sheet: list[tuple[str, str]], arguments: argparse.Namespace
    ) -> None:
        self.session = session
        self.parts: list[str] = []
        self.passages: list[JudgedPassage] = []
        self.right = self.begun = 0
        self._arguments = arguments
        facts = [Fact(cue, value, f"{cue}{value}.\n") for cue, value in sheet]
        self._judge: Judge = (lambda *_: 1.0) if arguments.no_judge else fact_judge(facts)
        self._turns = cycle(sheet)
        session.read("".join(f"{cue}{value}.\n" for cue, value in sheet * 3))

    def chapter(self, number: int, title: str) -> None:
        """A heading, free passages, and two facts to complete."""
        self._read(f"\n\nCHAPTER {number}. {title}.\n\n")
        count = max(1, self._arguments.chapter_bytes // self._arguments.passage_bytes)
        self._write(
            passages=count,
            candidates=self._arguments.candidates,
            max_tokens=self._arguments.passage_bytes,
            temperature=self._arguments.temperature,
        )
        for cue, value in islice(self._turns, 2):
            self._read(f"\n{cue}")
            # One byte more than the value: only then is it known where the word ends.
            passage = self._write(max_tokens=len(value.encode()) + 1, temperature=0.0, stop=["."])[
                0
            ]
            self.begun += 1
            self.right += passage.text.startswith(value)

    def _read(self, text: str) -> None:
        self.session.read(text)
        self.parts.append(text)

    def _write(self, **options: Any) -> list[JudgedPassage]:
        written = write_judged(self.session, self._judge, **options)
        self.passages += written
        self.parts += [passage.text for passage in written]
        return written


def main() -> None:
    """Writes the book and says how it kept to the sheet."""
    arguments = parse_arguments()
    sheet = load_sheet(arguments.sheet)
    outline = read_text(arguments.outline).splitlines() if arguments.outline else OUTLINE
    model = fastweights.load_model(arguments.model)
    session = Session(model, seed=arguments.seed, store=not arguments.no_store)
    book = Book(session, sheet, arguments)
    for number, title in enumerate(tqdm(outline, unit="chapter"), start=1):
        book.chapter(number, title)
    text = "".join(book.parts)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8", errors="surrogateescape")
    else:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    windows = len(text) / model.config.attention_window
    corrected = sum(bool(passage.judgement.correction) for passage in book.passages)
    print(
        f"\n{len(text)} characters in {len(outline)} chapters, {windows:.0f} attention windows; "
        f"{book.right} of {book.begun} facts completed rightly; "
        f"{corrected} of {len(book.passages)} passages corrected",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
