"""Speculative decoding from Python: the same text and session, and what its options refuse."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_models import small_model
from small_sessions import same_bits

from fastweights import Candidate, Error, Judgement, Session, SessionPool, write_judged
from fastweights.nn import LanguageModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    return small_model(vocabulary_size=256)


def started(model: LanguageModel) -> Session:
    session = Session(model)
    session.read("Round and round and round the r")
    return session


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def test_look_up_changes_nothing(model: LanguageModel) -> None:
    plain, ahead = started(model), started(model)
    assert ahead.write(max_tokens=100, seed=1, ahead=8) == plain.write(max_tokens=100, seed=1)
    assert same_bits(ahead, plain)


def test_guesses_of_a_function(model: LanguageModel) -> None:
    plain = started(model)
    text = as_bytes(plain.write(max_tokens=100, seed=1))
    heard = bytearray()
    calls = 0

    def guess(since: bytes, most: int) -> bytes:
        nonlocal calls
        assert isinstance(since, bytes)
        heard.extend(since)
        calls += 1
        return text[len(heard) : len(heard) + most]

    session = started(model)
    assert as_bytes(session.write(max_tokens=100, seed=1, ahead=9, guess=guess)) == text
    assert same_bits(session, plain)
    assert text.startswith(heard)
    assert calls <= 14


def test_a_guess_may_be_text_or_bytes_and_nothing_else(model: LanguageModel) -> None:
    plain = started(model)
    text = plain.write(max_tokens=20, seed=1)
    for guess in (lambda since, most: "ä", lambda since, most: b"\xff\x00"):
        assert started(model).write(max_tokens=20, seed=1, ahead=4, guess=guess) == text
    with pytest.raises(TypeError):
        started(model).write(max_tokens=20, ahead=4, guess=lambda since, most: 7)  # type: ignore[arg-type,return-value]


def test_what_a_guess_throws_reaches_the_caller(model: LanguageModel) -> None:
    def guess(since: bytes, most: int) -> bytes:
        raise KeyError("no guess")

    session = started(model)
    before = session.position
    with pytest.raises(KeyError, match="no guess"):
        session.write(max_tokens=20, ahead=4, guess=guess)
    assert session.position == before + 1
    assert len(as_bytes(session.write(max_tokens=5))) == 5


def test_a_guess_can_not_use_the_session_that_writes(model: LanguageModel) -> None:
    session = started(model)
    with pytest.raises(Error, match="another call is using it"):
        session.write(max_tokens=20, ahead=4, guess=lambda since, most: session.write())


def test_options_out_of_range(model: LanguageModel) -> None:
    for ahead in (-1, 65):
        with pytest.raises(Error, match=r"ahead must be in \[0, 64\]"):
            started(model).write(ahead=ahead)
    with pytest.raises(Error, match="no use where ahead is 0"):
        started(model).write(guess=lambda since, most: b"")


def test_in_a_pool(model: LanguageModel) -> None:
    pool = SessionPool(model)
    pool.create("one")
    pool.read("one", "Round and round and round the r")
    plain = pool.use("one", lambda session: session.fork())
    text = plain.write(max_tokens=60, seed=1)
    assert pool.write("one", max_tokens=60, seed=1, ahead=8) == text


def test_where_writing_is_judged(model: LanguageModel) -> None:
    plain, ahead, guessed = (started(model) for _ in range(3))
    asked = []

    def guess(since: bytes, most: int) -> bytes:
        asked.append(most)
        return b"round"[:most]

    def judge(before: Session, candidates: Sequence[Candidate]) -> Judgement:
        return Judgement(choice=1, strength=0.5)

    written = write_judged(plain, judge, passages=2, candidates=2, max_tokens=40, seed=1)
    for session, options in ((ahead, {}), (guessed, {"guess": guess})):
        assert (
            write_judged(
                session, judge, passages=2, candidates=2, max_tokens=40, seed=1, ahead=8, **options
            )
            == written
        )
        assert same_bits(session, plain)
    assert asked


def test_the_example(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(b"".join(b"Line %d of the book, and no more.\n" % n for n in range(200)))
    command = [sys.executable, str(ROOT / "examples" / "write_ahead.py")]
    options = ["--bytes", "60", "--ahead", "4"]
    result = subprocess.run(
        [*command, str(book), *options], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "4 ahead" in result.stdout
    assert "the same bits" in result.stdout
    book.write_text("short")
    for bad in (book, tmp_path / "missing"):
        result = subprocess.run([*command, str(bad)], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert result.stderr.startswith("write_ahead: ")
        assert result.stderr.count("\n") == 1
