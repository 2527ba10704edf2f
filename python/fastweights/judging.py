"""Writing that is judged: write, ask a judge, learn as it says (docs/judging.md)."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from . import _C
from .session import Progress, Session, Text, _to_bytes, _to_text, _write_options


class Candidate(NamedTuple):
    """A way to go on, and the session that has written it."""

    text: str
    after: Session


class Judgement(NamedTuple):
    """What a judge says."""

    choice: int = 0  # the candidate that stays; the others leave no trace
    strength: float = 1.0  # how strongly it is learned, as in Session.feedback: 0 … 2
    correction: Text = ""  # read after it, and learned; empty: nothing


class JudgedPassage(NamedTuple):
    """A passage that stayed, and what was said of it."""

    position: int  # where it begins
    text: str
    judgement: Judgement


class Fact(NamedTuple):
    """Something that a text must not contradict: wherever it says `cue`, `value` must follow."""

    cue: Text  # "The steward's name is "
    value: Text  # "Aldous"
    statement: Text = ""  # read where a text contradicts it; empty: cue, value, ".\n"


Judge = Callable[[Session, Sequence[Candidate]], Judgement | float]


class NativeJudge:
    """A judge of the library. It can be called as any other, so that judges can ask each other."""

    def __init__(self, native: _C.Judge) -> None:
        self._native = native

    def __call__(self, before: Session, candidates: Sequence[Candidate]) -> Judgement:
        pairs = [(_to_bytes(text), after._session) for text, after in candidates]
        return _judgement(self._native(before._session, pairs))


def write_judged(
    session: Session,
    judge: Judge,
    *,
    passages: int = 1,
    candidates: int = 1,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Text | Sequence[Text] = (),
    on_token: Callable[[str], bool | None] | None = None,
    ahead: int = 0,
    guess: Callable[[bytes, int], Text] | None = None,
    progress: Progress | None = None,
) -> list[JudgedPassage]:
    """Writes passages, has each judged, and learns as the judge says.

    Afterwards the session is, bit for bit, one that for each passage wrote the chosen candidate,
    was given feedback(passage, strength), and read the correction. If a call raises, the session
    holds the passages that were judged before.

    Args:
        session: it is in use until the call is over; the judge gets copies.
        judge: called as judge(before, candidates) with the session that all candidates go on from,
            and the candidates; returns a Judgement, or a number: the strength of the first
            candidate.
        passages: to write, one after the other; each is judged before the next.
        candidates: written for each passage. The first draws from the session's generator, each
            further one from a generator that is seeded with the next number of that one.
        max_tokens: bytes of a passage at most; see `Session.write`, so are the next four.
        temperature: see `Session.write`.
        top_k: see `Session.write`.
        top_p: see `Session.write`.
        seed: restarts the generator before the first passage.
        stop: a passage ends as soon as it ends with one of these.
        on_token: sees all candidates, one after the other.
        ahead: see `Session.write`.
        guess: see `Session.write`; each candidate is a write of its own.
        progress: called between passages with those done and in all; False raises `Cancelled`.

    Raises:
        Error: an option or a judgement is out of range.
    """
    native = judge._native if isinstance(judge, NativeJudge) else _on_fields(judge)
    with _write_options(
        max_tokens, temperature, top_k, top_p, seed, stop, on_token, ahead, guess
    ) as options:
        written = _C.write_judged(session._session, native, passages, candidates, options, progress)
    return [
        JudgedPassage(position, _to_text(text), _judgement(fields))
        for position, text, fields in written
    ]


def fact_judge(
    facts: Iterable[Fact | tuple[Text, Text]],
    *,
    right: float = 1.0,
    wrong: float = 0.0,
    silent: float = 1.0,
    correct: bool = True,
) -> NativeJudge:
    """A judge that holds a text against a fact sheet.

    It keeps the candidate with the fewest contradictions, of equals the one with the most right
    statements, of these the first. Any run of white space is as good as another; a value ends where
    a word ends. A statement that began in an earlier passage counts in the passage that decides it.

    Args:
        facts: the sheet; pairs of cue and value will do.
        right: strength of a passage that states facts rightly.
        wrong: of one that contradicts any.
        silent: of one that states none.
        correct: whether the statement of each contradicted fact is read.

    Raises:
        Error: a cue or a value is empty.
    """
    sheet = [
        (_to_bytes(fact.cue), _to_bytes(fact.value), _to_bytes(fact.statement))
        for fact in (Fact(*each) for each in facts)
    ]
    return NativeJudge(_C.fact_judge(sheet, right, wrong, silent, correct))


def likelihood_judge(
    held_out: Text, *, tolerance: float = 0.0, better: float = 1.0, worse: float = 0.0
) -> NativeJudge:
    """A judge that asks what learning a passage does to a held-out text.

    It keeps the candidate after which the text costs the fewest bits. Each judgement reads the text
    once per candidate, and once from the place before.

    Args:
        held_out: the text.
        tolerance: bits per byte that it may cost more.
        better: strength of a passage within the tolerance.
        worse: of one beyond it.

    Raises:
        Error: the text is empty.
    """
    return NativeJudge(_C.likelihood_judge(_to_bytes(held_out), tolerance, better, worse))


def preference_judge(second_is_better: Callable[[str, str], bool]) -> NativeJudge:
    """A judge that asks for preferences between pairs.

    The first against the second candidate, the winner against the third, and so on. Where there is
    only one candidate the judge raises Error.
    """

    def on_bytes(first: bytes, second: bytes) -> bool:
        return bool(second_is_better(_to_text(first), _to_text(second)))

    return NativeJudge(_C.preference_judge(on_bytes))


_Fields = tuple[int, float, bytes]


def _on_fields(judge: Judge) -> Callable[[_C.Session, list[tuple[bytes, _C.Session]]], _Fields]:
    def ask(before: _C.Session, candidates: list[tuple[bytes, _C.Session]]) -> _Fields:
        answer = judge(
            Session._of(before),
            [Candidate(_to_text(text), Session._of(after)) for text, after in candidates],
        )
        if not isinstance(answer, Judgement):
            answer = Judgement(strength=float(answer))
        return answer.choice, answer.strength, _to_bytes(answer.correction)

    return ask


def _judgement(fields: _Fields) -> Judgement:
    choice, strength, correction = fields
    return Judgement(choice, strength, _to_text(correction))


__all__ = [
    "Candidate",
    "Fact",
    "Judge",
    "JudgedPassage",
    "Judgement",
    "fact_judge",
    "likelihood_judge",
    "preference_judge",
    "write_judged",
]
