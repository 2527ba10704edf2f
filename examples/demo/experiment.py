"""The demo's main job: read a text in several ways, and measure what the memory gave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import learning
import numpy as np
import recall
import resume
from intervals import LEVEL, RESAMPLES, Array, Interval, ratio_interval
from ppmd import ORDER, PIECE, ppmd_bits
from readings import reach, read_carried, read_off, read_reset, window_only
from tqdm import tqdm

import fastweights
from fastweights.nn import LanguageModel

BLOCK_BYTES = 8192
CLOZES = 100
FOREIGN_BYTES = 4096
PROBE_BYTES = 2048
CARRIED, STORE, OFF, FRESH = "carried", "store", "off", "fresh"
PRIMED, UNPRIMED = "ppmd_primed", "ppmd_unprimed"


@dataclass
class Source:
    """What the demo works on."""

    model_path: Path
    name: str
    text: bytes
    training: list[bytes]  # what the model was trained on, where it is at hand
    other_name: str  # of a text of the kind that the model knows, empty if none is at hand
    other: bytes


class Meter:
    """A progress bar in bytes that also notes the memory of the process."""

    def __init__(self, label: str, total: int, quiet: bool) -> None:
        self._bar = tqdm(
            total=total, desc=f"  {label:<24}", unit="B", unit_scale=True, disable=quiet
        )
        self._total = total
        self._done = 0
        self.resident: list[tuple[int, int]] = []  # bytes read, bytes of memory

    def __call__(self, count: int) -> None:
        count = min(count, self._total - self._done)
        self._done += count
        self._bar.update(count)
        pages = Path("/proc/self/statm")
        if pages.exists():
            size = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.resident.append((self._done, size))

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class Experiment:
    """Reads one text with one model; `figures` holds what was measured, ready for JSON."""

    def __init__(self, source: Source, quiet: bool) -> None:
        self.source = source
        self.text = source.text
        self.quiet = quiet
        self.model: LanguageModel = fastweights.load_model(source.model_path)
        self.ablated = window_only(source.model_path)
        self.window = self.model.config.attention_window
        self.block = max(1, BLOCK_BYTES // self.window)
        native = self.model.native()
        self.session = fastweights.Session(native)
        self.with_store = fastweights.Session(native, store=True)
        self.words = recall.find_words(
            self.text, recall.commonest_words(source.training or [self.text])
        )
        self.readings: dict[str, Array] = {}
        self.figures: dict[str, Any] = {
            "text": {"name": source.name, "bytes": len(self.text)},
            "model": self._describe_model(),
        }

    def _describe_model(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "path": shown(self.source.model_path),
            "parameters": self.model.parameter_count(),
            "layers": config.layers,
            "window": config.attention_window,
            "reach": reach(self.model),
            "state_bytes": self.model.state_bytes(1),
            "memory_dropout": config.memory_dropout,
        }

    # ---- reading -------------------------------------------------------------------------------

    def read(self) -> None:
        """Reads the text in every way."""
        asked = recall.choose_clozes(self.words, self.text, CLOZES)
        answers = {CARRIED: self._read_carried(asked), STORE: self._read_with_store(asked)}
        far = -(-recall.FAR // self.window) * self.window
        for period in sorted({self.window, far}):
            name = f"reset_{period}"
            with Meter(f"emptied every {period}", len(self.text), self.quiet) as advance:
                self.readings[name] = read_reset(self.model, self.text, period, advance)
        with Meter("attention window only", len(self.text), self.quiet) as advance:
            self.readings[OFF] = read_off(self.ablated, self.text, advance)
        self._complete(asked, answers)

    def _read_carried(self, asked: list[recall.Word]) -> dict[int, str]:
        began = time.perf_counter()
        with Meter("memory carried", len(self.text), self.quiet) as advance:
            answers = self._read_on(CARRIED, self.session, asked, advance)
        self.figures["reading"] = {
            "seconds": time.perf_counter() - began,
            "resident_bytes": advance.resident[:: max(1, len(advance.resident) // 50)],
            "session_bytes": _session_bytes(self.session),
            "log_bytes": self.session.position,
        }
        return answers

    def _read_with_store(self, asked: list[recall.Word]) -> dict[int, str]:
        began = time.perf_counter()
        with Meter("with an exact store", len(self.text), self.quiet) as advance:
            answers = self._read_on(STORE, self.with_store, asked, advance)
        self.figures["store"] = {
            "seconds": time.perf_counter() - began,
            "store_bytes": self.with_store.report().store_bytes,
        }
        return answers

    def _read_on(
        self, name: str, session: fastweights.Session, asked: list[recall.Word], advance: Meter
    ) -> dict[int, str]:
        answers: dict[int, str] = {}

        def visit(position: int, copied: fastweights.Session) -> None:
            answers[position] = recall.complete(copied)

        stops = [word.begin + recall.CLUE for word in asked]
        self.readings[name] = read_carried(session, self.text, stops, visit, advance)
        return answers

    # ---- bits per byte -------------------------------------------------------------------------

    def compare(self) -> None:
        """Bits per byte of each reading and of PPMd; what each costs more than the carried one."""
        ppmd = {UNPRIMED: ppmd_bits(b"", self.text)}
        if self.source.training:
            ppmd[PRIMED] = ppmd_bits(b"".join(self.source.training), self.text)
        totals = {name: float(bits.sum()) for name, bits in self.readings.items()}
        totals |= {name: float(bits.sum()) for name, bits in ppmd.items() if bits is not None}
        self.figures |= {
            "bits_per_byte": {name: bits / len(self.text) for name, bits in totals.items()},
            "cost": {name: self._cost(name)._asdict() for name in self.readings if name != CARRIED},
            "bootstrap": {
                "kind": "circular block bootstrap over paired windows",
                "level": LEVEL,
                "resamples": RESAMPLES,
                "window_bytes": self.window,
                "block_bytes": self.block * self.window,
            },
            "ppmd": {"order": ORDER, "piece_bytes": PIECE},
            "samples": {
                "window_bits": {n: _rounded(self._sums(b)) for n, b in self.readings.items()},
                "ppmd_piece_bits": {n: _rounded(b) for n, b in ppmd.items() if b is not None},
            },
        }

    def _cost(self, name: str) -> Interval:
        difference = self.readings[name] - self.readings[CARRIED]
        counts = self._sums(np.ones(len(self.text)))
        return ratio_interval(self._sums(difference), counts, self.block)

    def _sums(self, values: Array) -> Array:
        """The sum over each window; the last one may be shorter."""
        return np.add.reduceat(values, np.arange(0, len(values), self.window))

    # ---- recall --------------------------------------------------------------------------------

    def measure_recall(self) -> None:
        """Bits per word by distance from the word's previous occurrence."""
        rows = recall.by_distance(self.words, self.readings, self.window, self.block)
        far = recall.far_words(self.words, self.readings, self.window, self.block)
        self.figures["recall"] = {
            "by_distance": [row.as_dict() for row in rows],
            "far": far.as_dict() if far else None,
        }

    def _complete(self, asked: list[recall.Word], by_session: dict[str, dict[int, str]]) -> None:
        """Completes the clozes also without what the memory holds.

        That is by a session that has read only as many bytes as attention reaches, and by one
        whose memories are switched off.
        """
        native, without = self.model.native(), self.ablated.native()
        clozes = []
        for word in tqdm(asked, desc=f"  {'completing names':<24}", disable=self.quiet):
            position = word.begin + recall.CLUE
            answers = {name: given[position] for name, given in by_session.items()}
            for name, model in ((FRESH, native), (OFF, without)):
                session = fastweights.Session(model)
                session.read(self.text[max(0, position - reach(self.model)) : position])
                answers[name] = recall.complete(session)
            clozes.append(recall.make_cloze(self.text, word, answers))
        self.figures["cloze"] = {
            "asked": len(clozes),
            "right": {
                name: recall.count_right(clozes, name) for name in (CARRIED, STORE, FRESH, OFF)
            },
            "items": [cloze._asdict() for cloze in clozes],
        }

    # ---- correcting, going back, making a model ------------------------------------------------

    def correct(self) -> None:
        """A false fact is planted, taken back, restored, and put right."""
        size = 2 * reach(self.model)
        between = (self.text * -(-size // len(self.text)))[:size]
        self.figures["feedback"] = {
            "false": learning.statement("false"),
            "true": learning.statement("true"),
            "between_bytes": len(between),
            "sessions": {
                name: learning.teach(session, between) for name, session in self._sessions()
            },
        }

    def go_back(self) -> None:
        """A page of this program is read and more is written, then the sessions roll back."""
        foreign = Path(__file__).read_bytes()[:FOREIGN_BYTES]
        probe = (self.source.other or self.text)[:PROBE_BYTES]
        self.figures["rollback"] = {
            "foreign_bytes": len(foreign),
            "probe": self.source.other_name or self.source.name,
            "probe_bytes": len(probe),
            "sessions": {
                name: learning.go_back(session, foreign, probe)
                for name, session in self._sessions()
            },
        }

    def consolidate(self) -> None:
        """Makes a model of half of the text, if the next part and another text speak for it."""
        parts = learning.divide(self.text, self.source.other)
        if parts is None:
            why = f"the text is shorter than {learning.LEAST_TEXT} bytes"
            self.figures["consolidation"] = {"accepted": False, "why": why}
            return
        with tqdm(desc=f"  {'consolidating':<24}", unit="trial", disable=self.quiet) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            figures = learning.consolidate(self.session, self.model, parts, show)
        self.figures["consolidation"] = figures | {"other": self.source.other_name}

    def _sessions(self) -> list[tuple[str, fastweights.Session]]:
        return [(CARRIED, self.session), (STORE, self.with_store)]

    # ---- writing, saving, resuming -------------------------------------------------------------

    def write_and_resume(self) -> None:
        """Saves the session, goes on here and in another process, and compares the two."""
        following = self.text[:1000]
        with tempfile.TemporaryDirectory() as folder:
            state, text = Path(folder, "session.fwstate"), Path(folder, "text")
            self.session.save(state)
            text.write_bytes(following)
            size = state.stat().st_size
            there = _go_on_elsewhere(self.source.model_path, state, text)
        here = resume.go_on(self.session, following)
        written = bytes.fromhex(here["written"])
        self.figures["continuation"] = written.decode("utf-8", "replace")
        self.figures["resumed"] = {
            "file_bytes": size,
            "written_bytes": len(written),
            "read_bytes": len(following),
            "same_bytes": here["written"] == there["written"],
            "same_logits": here["logits"] == there["logits"],
        }


def shown(path: Path) -> str:
    """A path as it is written into results: below the project, relative to it."""
    root = Path(__file__).resolve().parents[2]
    path = path.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _session_bytes(session: fastweights.Session) -> int:
    return sum(tensor.nbytes for tensor in session.state().values())


def _rounded(values: Array) -> list[float]:
    return [round(float(value), 3) for value in values]


def _go_on_elsewhere(model: Path, state: Path, text: Path) -> dict[str, str]:
    script = Path(resume.__file__)
    command = [sys.executable, str(script), str(model), str(state), str(text)]
    answer: dict[str, str] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return answer
