"""Reads a text with a session that learns while it reads, and shows what its memory gave.

Then the session is corrected, taken back, resumed in another process, and made a model of.

scripts/demo                 a whole play that the shipped model has not seen
scripts/demo FILE            any file of yours
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from experiment import Source

ROOT = Path(__file__).resolve().parents[2]
PLAYS = ROOT / "data" / "plays"


def fail(message: str) -> NoReturn:
    """Ends the program with one clear line."""
    sys.exit(f"demo: {message}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Leaves NAME.png and NAME.json in the output folder. Without FILE, the text is the "
        "first of the works in scripts/held_out_works.txt, which the model was not trained on.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the text to read")
    parser.add_argument("--work", help="name of another held-out work")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "models" / "reader", help="model folder"
    )
    parser.add_argument(
        "--training",
        type=Path,
        default=PLAYS / "train",
        metavar="FOLDER",
        help="what the model was trained on: PPMd gets it too, and it tells which words are common",
    )
    parser.add_argument(
        "--limit", type=int, metavar="BYTES", help="read only the first BYTES bytes"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "demo", help="folder for what is left"
    )
    parser.add_argument(
        "--json-only", action="store_true", help="print the figures as JSON, no more"
    )
    arguments = parser.parse_args()
    if arguments.limit is not None and arguments.limit < 1:
        parser.error("--limit must be at least 1")
    if arguments.file and arguments.work:
        parser.error("give FILE or --work, not both")
    return arguments


def held_out_works() -> list[str]:
    """Names of the works that no training run saw."""
    lines = (ROOT / "scripts" / "held_out_works.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def find_work(name: str | None) -> Path:
    """The file of a held-out work, fetched if it is not there."""
    works = held_out_works()
    if name is not None and name not in works:
        fail(f"there is no held-out work {name!r}; there are {', '.join(works)}")
    path = PLAYS / "held_out" / f"{name or works[0]}.txt"
    if not path.exists():
        fetch = [sys.executable, str(ROOT / "scripts" / "fetch-texts")]
        if subprocess.run(fetch, stdout=sys.stderr, check=False).returncode != 0:
            fail("the texts could not be fetched; give a FILE of your own, or run it again")
    return path


def read_source(arguments: argparse.Namespace) -> tuple[str, bytes]:
    """Name and bytes of the text."""
    path = arguments.file or find_work(arguments.work)
    try:
        text = path.read_bytes()
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    if not text:
        fail(f"cannot read {path}: it is empty")
    return path.stem, text[: arguments.limit]


def other_work(text: bytes) -> tuple[str, bytes]:
    """Name and bytes of a held-out work that the text is not taken from; empty if none is there."""
    for name in held_out_works():
        path = PLAYS / "held_out" / f"{name}.txt"
        if path.exists() and not (work := path.read_bytes()).startswith(text):
            return name, work
    return "", b""


def run(source: Source, quiet: bool) -> dict[str, Any]:
    """The experiment, told as it goes unless `quiet`."""
    import report
    from experiment import Experiment

    def say(text: str) -> None:
        if not quiet:
            print(text + "\n", flush=True)

    began = time.perf_counter()
    experiment = Experiment(source, quiet)
    figures = experiment.figures
    say(report.header(figures))
    experiment.read()
    say("\n" + report.reading(figures))
    experiment.compare()
    say(report.bits_per_byte(figures))
    experiment.measure_recall()
    say(report.recall(figures))
    say(report.cloze(figures))
    experiment.correct()
    say(report.feedback(figures))
    experiment.go_back()
    say(report.rollback(figures))
    experiment.write_and_resume()
    say(report.continuation(figures))
    say(report.resumed(figures))
    experiment.consolidate()
    say(report.consolidation(figures))
    figures["seconds"] = time.perf_counter() - began
    return figures


def provenance() -> dict[str, Any]:
    """Machine, commit, date and command, as every stored figure carries them."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.record import commit, machine  # type: ignore[import-not-found]

    return {
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat("T", "seconds"),
        "command": " ".join(["scripts/demo", *sys.argv[1:]]),
    }


def leave(figures: dict[str, Any], folder: Path, name: str, quiet: bool) -> None:
    """Writes NAME.json and NAME.png."""
    from plots import save_plot

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        save_plot(figures, folder / f"{name}.png")
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}")
    if not quiet:
        print(
            f"Left {folder / name}.png and {folder / name}.json after {figures['seconds']:.0f} s."
        )


def broken_promises(figures: dict[str, Any]) -> Iterator[str]:
    """What should have been alike bit for bit and is not."""
    if not (figures["resumed"]["same_bytes"] and figures["resumed"]["same_logits"]):
        yield "the resumed session did not go on alike"
    if not all(each["restored"] for each in figures["feedback"]["sessions"].values()):
        yield "feedback did not restore what was learned"
    if not all(each["same_bits"] for each in figures["rollback"]["sessions"].values()):
        yield "rollback did not lead back to the same bits"


def main() -> None:
    """Command line."""
    arguments = parse_arguments()
    name, text = read_source(arguments)
    if not (arguments.model / "config.json").exists():
        fail(f"there is no model in {arguments.model}")
    from experiment import Source

    import fastweights

    training = [path.read_bytes() for path in sorted(arguments.training.glob("*.txt"))]
    source = Source(arguments.model, name, text, training, *other_work(text))
    try:
        figures = provenance() | run(source, arguments.json_only)
    except fastweights.Error as error:
        fail(str(error))
    leave(figures, arguments.output, name, arguments.json_only)
    if arguments.json_only:
        print(json.dumps(figures, indent=1))
    for broken in broken_promises(figures):
        fail(broken)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
