"""What can be done with what a session learned: correct it, take it back, make a model of it.

All of it is done on forks: the sessions that are handed in stay as they are.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

import fastweights
from fastweights.session import Progress

STEM = "The keeper of the northern lighthouse is called "
NAMES = {"false": "Matilda Thorne", "true": "Gregory Vale"}
WRITTEN = 400
TEMPERATURE = 0.8
LEAST_TEXT = 4096  # of shorter ones no model is made
MOST_TRIED = 12_000
MOST_MEASURED = 8000
TOLERANCE = 0.01

Figures = dict[str, Any]


def same_bits(one: fastweights.Session, other: fastweights.Session) -> bool:
    """Whether the tensors of two sessions, logits and generator included, agree bit for bit."""
    tensors, others = one.state(), other.state()
    return tensors.keys() == others.keys() and all(
        _same_tensors(tensor, others[name]) for name, tensor in tensors.items()
    )


def _same_tensors(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))


# ---- feedback ----------------------------------------------------------------------------------


def statement(which: str) -> str:
    """The fact that is planted: "false", or "true", which differs in the name."""
    return f"{STEM}{NAMES[which]}.\n"


def teach(session: fastweights.Session, between: bytes) -> Figures:
    """Plants a false fact, takes it back, restores it and corrects it; what both facts cost then.

    Before the session is asked it reads `between`, so that attention does not reach the fact.
    """
    session = session.fork()
    steps = {"before": _asked(session, between)}
    mark = session.mark()
    session.read(statement("false"))
    learned = session.fork()
    steps["read"] = _asked(session, between)
    began = time.perf_counter()
    session.feedback(mark, 0.0)
    seconds = time.perf_counter() - began
    steps["ignored"] = _asked(session, between)
    session.feedback(mark, 1.0)
    restored = same_bits(session, learned)
    session.correct(mark, statement("true"))
    steps["corrected"] = _asked(session, between)
    return {"steps": steps, "restored": restored, "seconds": seconds}


def _asked(session: fastweights.Session, between: bytes) -> Figures:
    session = session.fork()
    session.read(between)
    return {which: _cost_of(session, which) for which in NAMES}


def _cost_of(session: fastweights.Session, which: str) -> Figures:
    bits = session.token_bits(statement(which)).double()
    name = bits[len(STEM) : len(STEM) + len(NAMES[which])]
    return {"bits_per_byte": float(bits.mean()), "name_bits": float(name.sum())}


# ---- going back --------------------------------------------------------------------------------


def go_back(session: fastweights.Session, foreign: bytes, probe: bytes) -> Figures:
    """Reads a foreign page, writes on, and rolls back; what `probe` costs before and after."""
    session, before = session.fork(), session.fork()
    mark = session.mark()
    bits = {"before": session.score(probe)}
    session.read(foreign)
    session.write(max_tokens=WRITTEN, temperature=TEMPERATURE, seed=1)
    bits["after"] = session.score(probe)
    undone = session.position - before.position
    began = time.perf_counter()
    session.rollback(mark)
    seconds = time.perf_counter() - began
    bits["back"] = session.score(probe)
    return {
        "bits_per_byte": bits,
        "undone_bytes": undone,
        "seconds": seconds,
        "same_bits": same_bits(session, before),
    }


# ---- consolidation -----------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a new model is made from and measured with: neighbouring parts of two texts."""

    learned: int  # bytes of the text that the session has read, from its start
    trial: bytes  # what comes next in the text: it decides
    next: bytes  # what comes then: it decides nothing
    guarded: bytes  # of another text: it may cost TOLERANCE more
    unguarded: bytes  # what comes next in that text


def divide(text: bytes, other: bytes) -> Parts | None:
    """Half of the text is learned; None if it is too short."""
    if len(text) < LEAST_TEXT:
        return None
    learned, middle = len(text) // 2, len(other) // 2
    end = learned + min(MOST_TRIED, (len(text) - learned) // 2)
    guarded = middle + min(MOST_MEASURED, (len(other) - middle) // 2)
    return Parts(
        learned,
        text[learned:end],
        text[end : end + MOST_MEASURED],
        other[middle:guarded],
        other[guarded : guarded + MOST_MEASURED],
    )


def consolidate(session: fastweights.Session, model: Any, parts: Parts, show: Progress) -> Figures:
    """Goes back to the end of what is to be learned, and makes a model of it if that pays."""
    session = session.fork()
    undone = session.position - parts.learned
    began = time.perf_counter()
    session.rollback(parts.learned)
    figures: Figures = {
        "learned_bytes": parts.learned,
        "bytes": {name: len(getattr(parts, name)) for name in parts._fields[1:]},
        "tolerance": TOLERANCE,
        "undone_bytes": undone,
        "undone_seconds": time.perf_counter() - began,
    }
    try:
        result = session.consolidate(parts.trial, parts.guarded, tolerance=TOLERANCE, progress=show)
    except fastweights.Error as error:
        return figures | {"accepted": False, "why": str(error)}
    trials = [trial._asdict() for trial in result.trials]
    return figures | {
        "accepted": True,
        "chosen": result.chosen._asdict(),
        "trials": trials,
        "before": _measured(model, parts),
        "after": _measured(result.model, parts),
    }


def _measured(model: Any, parts: Parts) -> dict[str, float]:
    """Bits per byte of each part, by a fresh session."""
    texts = {name: getattr(parts, name) for name in parts._fields[1:]}
    return {name: fastweights.Session(model).score(text) for name, text in texts.items() if text}
