"""Going back in Python: the same calls as in C++, their arguments, errors, signals."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import small_model
from small_sessions import NOISE, same_bits

import fastweights
from fastweights import Cancelled, Error, Session
from fastweights.nn import LanguageModel
from fastweights.session import Mark, SessionReport, Strength


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    return small_model(vocabulary_size=256)


def driven(model: LanguageModel, end: int) -> Session:
    """Reads 100 bytes, writes 30, reads 70, or as much of that as `end` allows."""
    session = Session(model, piece=16)
    session.read(NOISE[: min(end, 100)])
    if end > 100:
        session.write(max_tokens=min(end - 100, 30), seed=5)
    if end > 130:
        session.read(NOISE[: end - 130])
    return session


@pytest.mark.parametrize("journal_bytes", [0, 64 << 20])
def test_rollback(model: LanguageModel, journal_bytes: int) -> None:
    session = Session(model, piece=16, journal_bytes=journal_bytes)
    session.read(NOISE[:100])
    session.write(max_tokens=30, seed=5)
    session.read(NOISE[:70])
    for end in (200, 195, 146, 131, 130, 117, 100, 99, 50, 0):
        session.rollback(end)
        assert session.position == end
        assert same_bits(session, driven(model, end))
    assert (session.report().checkpoints == 0) == (journal_bytes == 0 or session.position == 0)


def test_feedback_sets_and_takes_back(model: LanguageModel) -> None:
    session = driven(model, 100)
    mark = session.mark()
    before = session.state()
    session.write(max_tokens=30, seed=5)
    learned = session.fork()
    session.feedback(mark, 0)
    assert session.strengths() == [Strength(100, 130, 0.0)]
    for name, tensor in session.state().items():
        if name.endswith("memory.state"):
            assert torch.equal(tensor, before[name])
    session.feedback(mark, 1.5)
    session.feedback(110, 120, 0.5)
    assert session.strengths() == [(100, 110, 1.5), (110, 120, 0.5), (120, 130, 1.5)]
    assert not same_bits(session, learned)
    assert same_bits(session, session.replayed(model, piece=16))
    session.feedback(0, 130, 1)
    assert session.strengths() == []
    assert same_bits(session, learned)
    with pytest.raises(Error, match=r"must be in \[0, 2\], got 3"):
        session.feedback(mark, 3)
    with pytest.raises(Error, match="must be a number, got a mark"):
        session.feedback(mark, mark)  # type: ignore[call-overload]
    with pytest.raises(Error, match=r"must be a mark or a position, got 1\.5"):
        session.feedback(mark, 1.5, 1.5)  # type: ignore[call-overload]
    assert same_bits(session, learned)


def test_feedback_is_what_the_model_computes(model: LanguageModel) -> None:
    session = Session(model, piece=16)
    session.read(NOISE[:50])
    session.feedback(10, 20, 0.25)
    strength = torch.ones(1, 50)
    strength[0, 10:20] = 0.25
    state = None
    with torch.no_grad():
        for begin in range(0, 50, 16):
            piece = slice(begin, min(begin + 16, 50))
            tokens = torch.tensor([list(NOISE[:50])])[:, piece]
            state = model(tokens, state, write_strength=strength[:, piece]).state
    assert state is not None
    mine = session.state()
    for name, tensor in state.tensors().items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-5)


def test_correct(model: LanguageModel) -> None:
    session = driven(model, 100)
    mark = session.mark()
    session.write(max_tokens=20)
    expected = session.fork()
    expected.feedback(mark, 0)
    expected.read("The better answer. Ä")
    session.correct(mark, "The better answer. Ä")
    assert same_bits(session, expected)
    assert session.log() == expected.log()


def test_revoke(model: LanguageModel) -> None:
    session = Session(model, piece=16)
    session.read(NOISE[:60])
    middle = session.mark()
    session.read(NOISE[100:150])
    session.revoke(20, 80)
    expected = Session(model, piece=16)
    expected.read(NOISE[:20])
    expected.read(NOISE[120:150])
    assert same_bits(session, expected)
    assert session.log() == expected.log()
    assert session.position_of(middle) == 20
    session.revoke(middle, session.position)
    assert session.position == 20


def test_marks_and_commit(model: LanguageModel) -> None:
    session = driven(model, 100)
    mark = session.mark()
    assert isinstance(mark, Mark)
    assert session.position_of(mark) == 100
    assert session.marks() == [mark]
    fork = copy.copy(session)
    assert fork.marks() == [mark]
    theirs = fork.mark()
    with pytest.raises(Error, match="none of this session's"):
        session.rollback(theirs)
    session.read("more")
    later = session.mark()
    session.rollback(mark)
    with pytest.raises(Error, match="rolled back to before it"):
        session.position_of(later)
    tensors = session.state()
    session.commit()
    assert all(torch.equal(session.state()[name], tensors[name]) for name in tensors)
    assert session.log() == []
    assert session.position == 100
    with pytest.raises(Error, match=r"commit\(\)"):
        session.feedback(mark, 0)
    with pytest.raises(Error, match="before 100 is committed"):
        session.rollback(99)
    with pytest.raises(Error, match="committed cannot be replayed"):
        session.replayed(model)
    with pytest.raises(Error, match="at least 0, got -1"):
        session.rollback(-1)
    session.read("and on")
    assert session.log() == [("read", b"and on")]


def test_report(model: LanguageModel) -> None:
    session = driven(model, 130)
    session.mark()
    report = session.report()
    assert isinstance(report, SessionReport)
    assert (report.read, report.written, report.committed, report.marks) == (100, 30, 0, 1)
    assert report.checkpoints > 0
    assert report.checkpoint_bytes > report.checkpoints * 1000
    assert 130 <= report.log_bytes < 1000
    assert report.limited_writes == 0


def test_an_edit_that_is_stopped_has_not_happened(model: LanguageModel) -> None:
    session = Session(model, piece=16, journal_bytes=0)
    session.read(NOISE[:100])
    mark = session.mark()
    session.read(NOISE[:30])
    before = session.fork()

    def stop(done: int, total: int) -> bool:
        assert 0 < done <= total
        return False

    def fail(done: int, total: int) -> bool:
        raise ValueError("mine")

    with pytest.raises(Cancelled):
        session.rollback(mark, stop)
    with pytest.raises(Cancelled):
        session.feedback(mark, 0.5, progress=stop)
    with pytest.raises(Cancelled):
        session.revoke(0, 10, stop)
    with pytest.raises(Cancelled):
        session.correct(mark, NOISE[:40], 0.0, stop)
    with pytest.raises(ValueError, match="mine"):
        session.rollback(50, fail)
    assert same_bits(session, before)
    assert session.log() == before.log()
    assert session.marks() == [mark]


@pytest.mark.usefixtures("alarm")
def test_ctrl_c_stops_an_edit(model: LanguageModel) -> None:
    session = Session(model, piece=16, journal_bytes=0)
    session.read(NOISE * 10)
    before = session.fork()
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    with pytest.raises(KeyboardInterrupt):
        session.feedback(0, 10, 0.5)
    assert session.strengths() == []
    assert same_bits(session, before)


def test_marks_survive_in_files_and_other_processes(model: LanguageModel, tmp_path: Path) -> None:
    fastweights.save_model(tmp_path / "model", model)
    session = Session(fastweights.load_model(tmp_path / "model"), piece=16)
    session.read(NOISE[:100])
    mark = session.mark()
    session.write(max_tokens=20)
    session.feedback(mark, 0.5)
    session.save(tmp_path / "a.fwstate")
    code = (
        "import sys, fastweights as fw\n"
        "s = fw.Session.load(sys.argv[2], fw.load_model(sys.argv[1]))\n"
        "[mark] = s.marks()\n"
        "s.rollback(mark)\n"
        "print(mark.id, s.position, s.logits().numpy().tobytes().hex())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "a.fwstate")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    session.rollback(mark)
    logits = session.logits().numpy().tobytes().hex()
    assert answer.stdout.split() == [str(mark.id), "100", logits]


def test_a_merged_session_went_on_with_what_the_other_did() -> None:
    model = small_model(vocabulary_size=256).native()
    session = Session(model)
    session.read(NOISE[:100])
    other = session.fork()
    session.read(b"one end")
    other.read(b"the other")
    session.merge(other)
    expected = Session(model)
    for text in (NOISE[:100], b"one end", b"the other"):
        expected.read(text)
    assert same_bits(session, expected)
    session.merge(session)
    assert same_bits(session, expected)
    with pytest.raises(Error, match="the same model"):
        session.merge(Session(small_model(vocabulary_size=256, layers=1)))
