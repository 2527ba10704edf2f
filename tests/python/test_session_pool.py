"""Many sessions at once: each like a lone one, called from many threads."""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_sessions import NOISE, same_bits

import fastweights
from fastweights import Session, SessionPool
from fastweights.nn import LanguageModel, LanguageModelConfig


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(3)
    config = LanguageModelConfig(
        width=32,
        layers=2,
        feed_forward_width=48,
        attention_heads=2,
        attention_window=8,
        memory_heads=2,
        memory_value_heads=2,
        memory_key_size=8,
        memory_value_size=8,
        initializer_range=0.3,
    )
    return LanguageModel(config).eval()


@pytest.fixture
def pool(model: LanguageModel) -> SessionPool:
    return SessionPool(model, piece=16)


def in_threads(work: Callable[[int], object], count: int) -> list[object]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, range(count)))


def test_a_session_in_a_pool_is_a_lone_one(model: LanguageModel, tmp_path: Path) -> None:
    compare_with_lone_ones(model, tmp_path / "idle")
    assert list((tmp_path / "idle").iterdir()) == []


def compare_with_lone_ones(model: LanguageModel, folder: Path) -> None:
    lone = SessionPool(model, journal_bytes=0)
    lone.create("a")
    limit = 3 * lone.report().resident_bytes
    pool = SessionPool(model, piece=16, journal_bytes=1 << 14, memory_bytes=limit, folder=folder)

    def in_pool(i: int) -> str:
        name = f"session {i}/.."
        pool.create(name, seed=i)
        pool.read(name, NOISE[: 50 + i])
        mark = pool.use(name, Session.mark)
        text = pool.write(name, max_tokens=40, top_p=0.9)
        pool.use(name, lambda session: session.feedback(mark, 0.5))
        return text + pool.write(name, max_tokens=20, stop=["e", b"q"])

    def alone(i: int) -> tuple[str, Session]:
        session = Session(pool.model, piece=16, seed=i, journal_bytes=1 << 14)
        session.read(NOISE[: 50 + i])
        mark = session.mark()
        text = session.write(max_tokens=40, top_p=0.9)
        session.feedback(mark, 0.5)
        return text + session.write(max_tokens=20, stop=["e", b"q"]), session

    texts = in_threads(in_pool, 8)
    for i, text in enumerate(texts):
        expected, session = alone(i)
        assert text == expected
        assert same_bits(pool.use(f"session {i}/..", Session.fork), session)
    report = pool.report()
    assert report.resident + report.on_disk == 8
    assert report.saves > 0
    assert report.loads > 0
    assert report.mean_batch >= 1.0


def test_sessions_come_and_go(pool: SessionPool, tmp_path: Path) -> None:
    session = Session(pool.model, piece=16)
    session.read("some text")
    session.save(tmp_path / "a.fwstate")
    pool.add("added", session)
    pool.load("loaded", tmp_path / "a.fwstate")
    assert pool.ids() == ["added", "loaded"]
    assert "added" in pool
    session.write(max_tokens=5, seed=1)
    for name in pool.ids():
        pool.write(name, max_tokens=5, seed=1)
        assert same_bits(pool.use(name, Session.fork), session)
    pool.save("added", tmp_path / "b.fwstate")
    assert same_bits(Session.load(tmp_path / "b.fwstate", pool.model), session)
    pool.close("added")
    assert "added" not in pool
    with pytest.raises(fastweights.Error, match="no session 'added'"):
        pool.read("added", "x")


def test_callbacks_belong_to_their_call(pool: SessionPool) -> None:
    pool.create("a")
    seen: list[str] = []
    threads = set()

    def on_token(text: str) -> bool:
        threads.add(threading.get_ident())
        seen.append(text)
        return len(seen) < 4

    expected = Session(pool.model, piece=16).write(max_tokens=50, seed=1)
    text = pool.write("a", max_tokens=50, seed=1, on_token=on_token)
    assert "".join(seen) == text
    assert expected.startswith(text)
    assert threads == {threading.get_ident()}
    with pytest.raises(fastweights.Cancelled):
        pool.read("a", NOISE[:100], progress=lambda done, _: done < 32)
    assert pool.use("a", lambda session: session.position) == 32 + len(
        text.encode("utf-8", "surrogateescape")
    )
    with pytest.raises(ZeroDivisionError):
        pool.write("a", on_token=lambda _: bool(1 / 0))
    with pytest.raises(ZeroDivisionError):
        pool.use("a", lambda _: 1 / 0)
    with pytest.raises(fastweights.Error, match="must not call the pool"):
        pool.use("a", lambda _: pool.read("a", "x"))


def test_a_session_is_lent(pool: SessionPool) -> None:
    pool.create("a")
    kept: list[Session] = []
    pool.use("a", kept.append)
    with pytest.raises(fastweights.Error, match="went back"):
        kept[0].read("x")
    pool.read("a", "x")
    assert pool.use("a", lambda session: session.position) == 1


def test_ctrl_c_ends_a_write(pool: SessionPool) -> None:
    pool.create("a")

    def interrupt() -> None:
        while pool.report().tokens_written < 20:
            pass
        signal.raise_signal(signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        pool.write("a", max_tokens=1_000_000_000)
    other.join()
    assert pool.use("a", lambda session: session.position) >= 20


def test_what_a_pool_refuses(model: LanguageModel, pool: SessionPool) -> None:
    with pytest.raises(fastweights.Error, match="most_per_batch"):
        SessionPool(model, most_per_batch=0)
    with pytest.raises(fastweights.Error, match="memory_bytes"):
        SessionPool(model, memory_bytes=-1)
    with pytest.raises(fastweights.FileError):
        SessionPool(model, folder="/proc/none/such")
    with pytest.raises(fastweights.Error, match="seed"):
        pool.create("a", seed=-1)
    with pytest.raises(fastweights.Error, match="1 to 80 bytes"):
        pool.create("")
    with pytest.raises(fastweights.Error, match="pool's model"):
        pool.add("a", Session(model))  # each `Session(model)` has a model of its own
    small = SessionPool(model, memory_bytes=1)
    small.create("a")
    with pytest.raises(fastweights.Error, match="memory_bytes"):
        small.create("b")
    assert small.ids() == ["a"]
