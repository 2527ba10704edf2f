"""Writing that is judged, in Python: the loop as in C++, judges of the user's and ready ones."""

import os
import signal
from collections.abc import Sequence

import pytest
import torch
from small_models import small_model
from small_sessions import same_bits

import fastweights
from fastweights import (
    Cancelled,
    Candidate,
    Error,
    Fact,
    Judgement,
    Session,
    SessionPool,
    fact_judge,
    likelihood_judge,
    preference_judge,
    write_judged,
)
from fastweights.nn import LanguageModel


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    return small_model(vocabulary_size=256)


@pytest.fixture
def session(model: LanguageModel) -> Session:
    session = Session(model, piece=16, seed=3)
    session.read("It was a dark and stormy night. ")
    return session


def candidate(session: Session, text: str) -> Candidate:
    after = session.fork()
    after.read(text)
    return Candidate(text, after)


def test_the_session_is_one_that_was_driven_so(session: Session) -> None:
    driven = session.fork()
    answers = iter([Judgement(strength=0.5, correction="No. "), Judgement(), Judgement(strength=0)])
    before: list[Session] = []

    def judge(session: Session, candidates: Sequence[Candidate]) -> Judgement:
        assert len(candidates) == 1
        before.append(session)
        return next(answers)

    seen: list[tuple[int, int]] = []
    passages = write_judged(
        session,
        judge,
        passages=3,
        max_tokens=20,
        seed=7,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [passage.judgement.strength for passage in passages] == [0.5, 1.0, 0.0]
    assert [passage.judgement.correction for passage in passages] == ["No. ", "", ""]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for i, passage in enumerate(passages):
        assert passage.position == driven.position
        assert same_bits(before[i], driven)
        mark = driven.mark()
        assert driven.write(max_tokens=20, seed=7 if i == 0 else None) == passage.text
        driven.feedback(mark, passage.judgement.strength)
        driven.read(passage.judgement.correction)
    assert same_bits(session, driven)
    assert session.strengths() == driven.strengths()


def test_candidates(session: Session) -> None:
    start = session.fork()
    seen: list[Candidate] = []

    def judge(before: Session, candidates: Sequence[Candidate]) -> Judgement:
        seen.extend(candidates)
        assert len({text for text, _ in candidates}) == 3
        return Judgement(choice=2)

    passages = write_judged(session, judge, candidates=3, max_tokens=20)
    assert passages[0].text == seen[2].text
    assert same_bits(session, seen[2].after)
    assert start.write(max_tokens=20) == seen[0].text
    seen[2].after.read("A judge may do as it likes with what it was given.")
    assert not same_bits(session, seen[2].after)


def test_a_number_is_the_strength_of_the_first(session: Session) -> None:
    driven = session.fork()
    passages = write_judged(session, lambda *_: 1.5, candidates=2, max_tokens=12)
    assert passages[0].judgement == Judgement(0, 1.5, "")
    mark = driven.mark()
    driven.write(max_tokens=12)
    driven.feedback(mark, 1.5)
    assert same_bits(session, driven)


def test_bytes_that_are_no_text(session: Session) -> None:
    tokens: list[str] = []
    correction = "\udcff\udc80"
    passages = write_judged(
        session,
        lambda *_: Judgement(correction=correction),
        max_tokens=64,
        temperature=3.0,
        on_token=tokens.append,
    )
    text = passages[0].text
    assert any("\udc80" <= each <= "\udcff" for each in text)
    assert "".join(tokens) == text
    assert passages[0].judgement.correction == correction
    assert session.log()[-2:] == [
        ("written", text.encode("utf-8", "surrogateescape")),
        ("read", b"\xff\x80"),
    ]


def test_errors_leave_the_session(session: Session) -> None:
    before = session.fork()

    def broken(*_: object) -> Judgement:
        raise ValueError("I cannot say")

    with pytest.raises(ValueError, match="I cannot say"):
        write_judged(session, broken, max_tokens=5)
    with pytest.raises(Error, match=r"strength must be in \[0, 2\], got 3"):
        write_judged(session, lambda *_: 3.0, max_tokens=5)
    with pytest.raises(Error, match=r"choice must be in \[0, 1\), got 1"):
        write_judged(session, lambda *_: Judgement(choice=1), max_tokens=5)
    with pytest.raises(Error, match="candidates must be at least 1"):
        write_judged(session, lambda *_: 1.0, candidates=0)
    with pytest.raises(Error, match="passages must be at least 0"):
        write_judged(session, lambda *_: 1.0, passages=-1)
    with pytest.raises(Error, match="seed must be"):
        write_judged(session, lambda *_: 1.0, seed=-1)
    with pytest.raises(ValueError, match="could not convert"):
        write_judged(session, lambda *_: "good", max_tokens=5)  # type: ignore[arg-type, return-value]
    with pytest.raises(Error, match="another call is using it"):
        write_judged(session, lambda *_: session.score("x"), max_tokens=5)
    with pytest.raises(Error, match="a cue and a value"):
        fact_judge([("", "x")])
    with pytest.raises(Error, match="held-out text is empty"):
        likelihood_judge("")
    assert same_bits(session, before)


def test_stopping(session: Session) -> None:
    begin = session.position
    with pytest.raises(Cancelled):
        write_judged(
            session,
            lambda *_: 1.0,
            passages=4,
            max_tokens=10,
            progress=lambda done, total: done < 2,
        )
    assert session.position == begin + 20

    def interrupt(done: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        write_judged(session, lambda *_: 1.0, passages=4, max_tokens=10, progress=interrupt)
    assert begin + 30 <= session.position <= begin + 40
    session.read("It goes on.")


def test_fact_judge(session: Session) -> None:
    judge = fact_judge(
        [("name is ", "Aldous"), Fact(b"colour is ", b"blue", b"Blue it is. ")],
        right=1.5,
        wrong=0.2,
    )
    said = [
        judge(session, [candidate(session, text)])
        for text in ("His name is\nAldous.", "name is Bo, colour is red", "Nothing.")
    ]
    assert said[0] == Judgement(0, 1.5, "")
    assert said[1].strength == pytest.approx(0.2)
    assert said[1].correction == "name is Aldous.\nBlue it is. "
    assert said[2] == Judgement(0, 1.0, "")
    both = [candidate(session, text) for text in ("name is Bo.", "name is Aldous.")]
    assert judge(session, both).choice == 1
    silent = fact_judge([("name is ", "Aldous")], correct=False, silent=0.5)
    assert silent(session, both[:1]) == Judgement(0, 0.0, "")
    assert silent(session, [candidate(session, "x")]).strength == 0.5


def test_likelihood_judge(session: Session) -> None:
    candidates = [candidate(session, text) for text in ("zzzz", "night and day. ", "q")]
    held_out = "night and day. "
    bits = [each.after.score(held_out) for each in candidates]
    before = session.score(held_out)
    best = min(range(3), key=bits.__getitem__)
    judge = likelihood_judge(held_out, tolerance=5.0, better=1.2)
    assert judge(session, candidates) == Judgement(best, pytest.approx(1.2), "")  # type: ignore[arg-type]
    worst = max(range(3), key=bits.__getitem__)
    strict = likelihood_judge(held_out, tolerance=bits[worst] - before - 1e-3, worse=0.25)
    assert strict(session, [candidates[worst]]).strength == 0.25


def test_preference_judge(session: Session) -> None:
    start = session.fork()
    judge = preference_judge(lambda first, second: second > first)
    passages = write_judged(session, judge, candidates=4, max_tokens=6, seed=1)
    seen: list[str] = []
    write_judged(
        start,
        lambda before, candidates: seen.extend(each.text for each in candidates) or 1.0,
        candidates=4,
        max_tokens=6,
        seed=1,
    )
    assert passages[0].text == max(seen)
    with pytest.raises(Error, match="at least two candidates"):
        write_judged(session, judge, max_tokens=6)

    def broken(first: str, second: str) -> bool:
        raise KeyError("no preference")

    with pytest.raises(KeyError, match="no preference"):
        write_judged(session, preference_judge(broken), candidates=2, max_tokens=6)


def test_judges_ask_judges(session: Session) -> None:
    facts = fact_judge([("name is ", "Aldous")])
    taste = preference_judge(lambda first, second: len(second) > len(first))

    def judge(before: Session, candidates: Sequence[Candidate]) -> Judgement:
        strict = facts(before, candidates)
        return strict if strict.strength == 0 else taste(before, candidates)

    assert len(write_judged(session, judge, passages=2, candidates=2, max_tokens=8)) == 2


def test_in_a_pool(model: LanguageModel) -> None:
    pool = SessionPool(model, piece=16)
    pool.create("a", seed=3)
    pool.read("a", "It was a dark and stormy night. ")
    alone = Session(pool.model, piece=16, seed=3)
    alone.read("It was a dark and stormy night. ")

    def work(session: Session) -> list[fastweights.JudgedPassage]:
        return write_judged(session, lambda *_: 0.5, passages=2, max_tokens=10)

    assert pool.use("a", work) == work(alone)
    assert pool.use("a", lambda session: same_bits(session, alone))
