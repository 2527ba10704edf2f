"""One session reads ten million bytes: memory, speed and bits per byte along the way.

It reads plays (data/plays/train, see scripts/fetch-texts) and the source of Python's standard
library in turns, alike in bytes for as long as there are plays. After every block it measures the
process's memory, the reading speed, the bits per byte of the block, and those of two texts that it
never reads, each on a fork: the start of a play and of a module. Then the session is saved; a run
that was ended goes on from there. Run from the project's root:

    python benchmarks/tasks/soak.py                    # goes on where the last run ended
    python benchmarks/tasks/soak.py --store            # with an exact store behind the memories
    python benchmarks/tasks/soak.py --bytes 200000 --block 50000 --folder build/soak-short \
        --output build/soak-short

Leaves soak.json and soak.png, or with a store soak_store.json and soak_store.png, in --output and
the session in --folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import fastweights
from fastweights import Session

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from process import resident_bytes
from record import Record, save_record
from works import read_works

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PLAYS = ROOT / "data" / "plays"
LIBRARY = Path(sysconfig.get_path("stdlib"))
HELD_OUT_MODULE = "argparse.py"
KINDS = ("plays", "modules")
PROBE_BYTES = 8192
Row = dict[str, Any]


class Text(NamedTuple):
    """What is read, and of which kind each byte is."""

    text: bytes
    kinds: NDArray[np.uint8]  # index of KINDS

    def digest(self) -> str:
        """Tells two texts apart."""
        return hashlib.sha256(self.text).hexdigest()[:16]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reader")
    parser.add_argument("--bytes", type=int, default=10_000_000, help="to read in all")
    parser.add_argument("--block", type=int, default=100_000, help="bytes between measurements")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--store", action="store_true", help="give the session an exact store")
    parser.add_argument("--folder", type=Path, help="default: build/soak, build/soak_store")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.folder is None:
        arguments.folder = ROOT / "build" / name_of(arguments)
    return arguments


def name_of(arguments: argparse.Namespace) -> str:
    """Of the run's results."""
    return "soak_store" if arguments.store else "soak"


def modules() -> list[bytes]:
    """The standard library, but for what is installed beside it and the module held out."""
    paths = sorted(path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py"))
    read = (p for p in paths if "site-packages" not in p.parts and p.name != HELD_OUT_MODULE)
    return [text for text in ((LIBRARY / path).read_bytes() for path in read) if text]


def make_text(size: int) -> Text:
    """Works in random, but fixed order; whichever kind has fewer bytes comes next."""
    works = [list(read_works(PLAYS / "train").values()), modules()]
    for each in works:
        random.Random(0).shuffle(each)
    parts: list[bytes] = []
    kinds: list[int] = []
    read = [0, 0]
    while sum(read) < size:
        left = [kind for kind in range(len(KINDS)) if works[kind]]
        if not left:
            sys.exit(f"soak: there are only {sum(read)} bytes to read, not {size}")
        kind = min(left, key=lambda kind: read[kind])
        work = works[kind].pop()
        read[kind] += len(work)
        parts.append(work)
        kinds.append(kind)
    lengths = [len(part) for part in parts]
    marks = np.repeat(np.array(kinds, np.uint8), lengths)
    return Text(b"".join(parts)[:size], marks[:size])


def make_probes() -> dict[str, bytes]:
    """The start of two texts that are never read."""
    module = (LIBRARY / HELD_OUT_MODULE).read_bytes()
    play = next(iter(read_works(PLAYS / "held_out").values()))
    return {"plays": play[:PROBE_BYTES], "modules": module[:PROBE_BYTES]}


class Soak:
    """A run: the session, the rows so far, and the folder that keeps both."""

    def __init__(self, arguments: argparse.Namespace, text: Text) -> None:
        """Takes up what the folder holds.

        Raises:
            SystemExit: it holds a run with another text, model or block.
        """
        self.text = text
        self.block: int = arguments.block
        self.probes = make_probes()
        self.folder: Path = arguments.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        model = fastweights.load_model(arguments.model).native()
        self._check_settings(arguments)
        state = self.folder / "soak.fwstate"
        self.session = (
            Session.load(state, model) if state.exists() else Session(model, store=arguments.store)
        )
        # A row is written before the state: what lies behind the state is measured again.
        rows = [row for row in self._stored_rows() if row["position"] <= self.session.position]
        self.rows: list[Row] = rows
        self.run: int = rows[-1]["run"] + 1 if rows else 0

    def _check_settings(self, arguments: argparse.Namespace) -> None:
        path = self.folder / "settings.json"
        settings = {
            "text": self.text.digest(),
            "block": arguments.block,
            "model": str(arguments.model.resolve()),
            "store": arguments.store,
        }
        if path.exists() and json.loads(path.read_text()) != settings:
            sys.exit(f"soak: {path} is of another run; name another --folder, or remove it")
        path.write_text(json.dumps(settings, indent=1) + "\n")

    def _stored_rows(self) -> list[Row]:
        path = self.folder / "rows.json"
        return json.loads(path.read_text()) if path.exists() else []

    def blocks(self) -> Iterator[Row]:
        """Reads on, a block at a time, and yields each row when all is saved."""
        total = len(self.text.text)
        start = self.session.position
        with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc="reading") as bar:
            while self.session.position < total:
                row = self._read_block(bar)
                bar.set_postfix_str(f"{row['bytes_per_second']:.0f} B/s", refresh=False)
                self.rows.append(row)
                self._save()
                yield row

    def _read_block(self, bar: Any) -> Row:
        begin = self.session.position
        end = min(begin + self.block, len(self.text.text))

        def show(done: int, _: int) -> None:
            bar.update(begin + done - bar.n)

        # Processor time: what else runs on the machine does not count.
        start = time.process_time()
        costs = self.session.read_and_score(self.text.text[begin:end], show)
        seconds = time.process_time() - start
        return {
            "run": self.run,
            "position": end,
            "bytes_per_second": (end - begin) / seconds,
            "resident_bytes": resident_bytes(),
            "bits": self._bits_by_kind(costs.double().numpy(), begin),
            "probe_bits": {name: self.session.score(text) for name, text in self.probes.items()},
        }

    def _bits_by_kind(self, costs: NDArray[np.float64], begin: int) -> dict[str, float]:
        kinds = self.text.kinds[begin : begin + len(costs)]
        found = {name: costs[kinds == index] for index, name in enumerate(KINDS)}
        return {name: float(part.mean()) for name, part in found.items() if len(part)}

    def _save(self) -> None:
        temporary = self.folder / "rows.tmp"
        temporary.write_text(json.dumps(self.rows))
        temporary.replace(self.folder / "rows.json")
        state = self.folder / "soak.fwstate"
        start = time.monotonic()
        self.session.save(state)
        self.rows[-1]["save_seconds"] = time.monotonic() - start
        self.rows[-1]["state_file_bytes"] = state.stat().st_size


def draw(rows: list[Row], path: Path) -> None:
    """Memory, speed and bits per byte over the bytes read."""
    figure, axes = plt.subplots(4, 1, figsize=(8, 10), sharex=True, layout="constrained")
    at = [row["position"] / 1e6 for row in rows]
    plays_end = max((row["position"] for row in rows if "plays" in row["bits"]), default=0) / 1e6
    for run in sorted({row["run"] for row in rows}):
        part = [row for row in rows if row["run"] == run]
        places = [row["position"] / 1e6 for row in part]
        axes[0].plot(places, [row["resident_bytes"] / 2**20 for row in part], ".-")
    axes[0].set_ylabel("memory of the process, MiB")
    axes[1].plot(at, [row["bytes_per_second"] for row in rows], ".-")
    axes[1].set_ylabel("bytes read per CPU second")
    for name in KINDS:
        axes[2].plot(at, [row["bits"].get(name, np.nan) for row in rows], ".-", label=name)
        axes[3].plot(at, [row["probe_bits"][name] for row in rows], ".-", label=name)
    axes[2].set_ylabel("bits per byte of what is read")
    axes[3].set(ylabel="bits per byte, held out", xlabel="megabytes read")
    for each in axes[:2]:
        each.set_ylim(bottom=0)
    for each in axes[2:]:
        each.legend()
    for each in axes:
        each.grid(alpha=0.3)
        if plays_end < at[-1]:
            each.axvspan(plays_end, at[-1], color="0.93", zorder=0)
    if plays_end < at[-1]:
        axes[3].text(plays_end, axes[3].get_ylim()[1], " modules only", va="top", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    soak = Soak(arguments, make_text(arguments.bytes))
    record = Record(f"One session reads {arguments.bytes:,} bytes", soak.rows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        for _ in soak.blocks():
            save_record(arguments.output / f"{name_of(arguments)}.json", record)
            draw(soak.rows, arguments.output / f"{name_of(arguments)}.png")
    except KeyboardInterrupt:
        print("soak: stopped; run it again to go on", file=sys.stderr)
        return 130
    first, last = soak.rows[0], soak.rows[-1]
    for name in ("resident_bytes", "bytes_per_second"):
        print(f"{name}: {first[name]:.0f} after the first block, {last[name]:.0f} after the last")
    for name in KINDS:
        bits = [row["probe_bits"][name] for row in (first, last)]
        print(f"held-out {name}: {bits[0]:.4f}, then {bits[1]:.4f} bits per byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
