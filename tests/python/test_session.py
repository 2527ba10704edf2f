"""Sessions in Python: the same as in C++, str and bytes, callbacks, signals, threads."""

import copy
import math
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small_models import VARIANTS, small_model
from small_sessions import NOISE, same_bits

import fastweights
from fastweights import Session
from fastweights.nn import LanguageModel


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    return small_model(vocabulary_size=256)


# ---- fused kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_writes_is_what_the_python_model_would(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = small_model(variant, vocabulary_size=256).to(dtype)
    session = Session(model)
    assert session.fused
    text = session.write(max_tokens=24, seed=1).encode("utf-8", "surrogateescape")
    # The same weights, computed with in fp32.
    exact = small_model(variant, vocabulary_size=256)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})

    def logits(of: LanguageModel) -> torch.Tensor:
        with torch.no_grad():
            output = of(torch.tensor([list(text)]), last_logits_only=True).logits
        assert output is not None
        return output.flatten()

    def error(of: torch.Tensor) -> float:
        return float((of - logits(exact)).norm() / logits(exact).norm())

    # In bf16 the modules round every activation, the fused kernels only what the state keeps.
    assert error(session.logits()) < (1e-5 if dtype == torch.float32 else error(logits(model)))


def test_a_model_in_fp64_is_run_by_its_modules() -> None:
    session = Session(small_model(vocabulary_size=256).double())
    assert not session.fused
    assert len(session.write(max_tokens=3).encode("utf-8", "surrogateescape")) == 3


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_are_those_of_the_python_model(variant: str) -> None:
    model = small_model(variant, vocabulary_size=256)
    bits = Session(model, piece=64).token_bits(NOISE[:300])
    tokens = torch.tensor(list(NOISE[:300])).unsqueeze(0)
    with torch.no_grad():
        log_p = model(tokens).logits[0].double().log_softmax(-1)
    expected = -log_p[:-1].gather(1, tokens[0, 1:, None]).squeeze(1) / math.log(2)
    assert bits.dtype == torch.float32
    assert bits[0] == pytest.approx(8.0, abs=1e-6)
    torch.testing.assert_close(bits[1:].double(), expected, rtol=1e-3, atol=1e-3)


def test_reading_and_scoring_agree(model: LanguageModel) -> None:
    session = Session(model, piece=100)
    session.read(NOISE[:150])
    before = copy.copy(session)
    bits = session.token_bits(NOISE[:333])
    assert session.score(NOISE[:333]) == pytest.approx(bits.double().mean().item(), rel=1e-9)
    assert same_bits(session, before)
    assert session.position == 150
    assert torch.equal(session.read_and_score(NOISE[:333]), bits)
    before.read(NOISE[:333])
    assert same_bits(session, before)


def test_str_and_bytes_are_the_same_text(model: LanguageModel) -> None:
    text = "Fünf Wörter, 五 words"
    texts = [text, text.encode(), bytearray(text.encode()), memoryview(text.encode())]
    sessions = [Session(model) for _ in texts]
    for session, each in zip(sessions, texts, strict=True):
        session.read(each)
        assert session.log() == [("read", text.encode())]
    assert all(same_bits(sessions[0], session) for session in sessions)
    with pytest.raises(TypeError):
        sessions[0].read(5)  # type: ignore[arg-type]


def test_any_bytes_survive_as_surrogate_escapes(model: LanguageModel) -> None:
    text = NOISE[:700].decode("utf-8", "surrogateescape")
    session = Session(model)
    session.read(text)
    assert session.log() == [("read", NOISE[:700])]
    written = session.write(max_tokens=100)
    assert session.log()[1].text == written.encode("utf-8", "surrogateescape")
    assert len(session.log()[1].text) == 100


def test_a_fresh_session_predicts_uniformly(model: LanguageModel) -> None:
    session = Session(model)
    assert session.position == 0
    assert torch.equal(session.logits(), torch.zeros(256))
    assert session.score("x") == pytest.approx(8.0, abs=1e-6)
    assert session.log() == []
    with pytest.raises(fastweights.Error, match="empty"):
        session.score("")


def test_state_names_everything_that_decides_the_next_token(model: LanguageModel) -> None:
    session = Session(model)
    session.read("Some text")
    state = session.state()
    config = model.config
    assert state["layers.0.memory.state"].shape == (
        1, config.memory_value_heads, config.memory_key_size, config.memory_value_size
    )  # fmt: skip
    assert state["layers.1.attention.key"].shape[1] == config.attention_window
    assert state["position"].tolist() == [9]
    assert state["generator"].tolist() == [0, 0]
    assert torch.equal(state["logits"], session.logits())
    state["layers.0.memory.state"].fill_(7)
    assert not same_bits(session, Session(model))
    assert not torch.equal(session.state()["layers.0.memory.state"], state["layers.0.memory.state"])


def test_ablated_models_run_too(model: LanguageModel) -> None:
    whole = Session(model).score(NOISE[:300])
    model.enable_memory(False)
    ablated = Session(model).score(NOISE[:300])
    model.enable_memory(True)
    assert whole != ablated
    assert Session(model).score(NOISE[:300]) == whole


def test_models_that_a_session_cannot_run_are_refused(model: LanguageModel) -> None:
    with pytest.raises(fastweights.Error, match="256 bytes, got 50"):
        Session(small_model())
    with pytest.raises(fastweights.Error, match="piece"):
        Session(model, piece=0)
    with pytest.raises(fastweights.Error, match="seed"):
        Session(model, seed=-1)
    hooked = small_model(vocabulary_size=256)
    hooked.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(fastweights.Error, match="norm"):
        Session(hooked)


# ---- writing ------------------------------------------------------------------------------------


def test_writing_is_repeatable(model: LanguageModel) -> None:
    a, b = Session(model), Session(model)
    for session in (a, b):
        session.read("Once")
    text = a.write(max_tokens=30, seed=7)
    assert b.write(max_tokens=30, seed=7) == text
    assert same_bits(a, b)
    assert a.position == 34
    assert a.write(max_tokens=30, seed=8) != text
    assert a.write(max_tokens=0) == ""
    greedy = Session(model).write(max_tokens=20, temperature=0)
    assert Session(model).write(max_tokens=20, top_k=1) == greedy
    assert Session(model, seed=5).write(max_tokens=20) == Session(model).write(
        max_tokens=20, seed=5
    )


def test_on_token_gets_whole_characters_and_can_stop(model: LanguageModel) -> None:
    pieces: list[str] = []
    text = Session(model).write(max_tokens=200, on_token=pieces.append)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 5

    pieces.clear()

    def stop(piece: str) -> bool:
        pieces.append(piece)
        return len(pieces) < 4

    session = Session(model)
    assert session.write(max_tokens=200, on_token=stop) == "".join(pieces)
    assert len(pieces) == 4
    assert text.startswith("".join(pieces))


def test_stop_strings(model: LanguageModel) -> None:
    text = Session(model).write(max_tokens=60).encode("utf-8", "surrogateescape")
    stop = text[30:32]
    expected = text[: text.find(stop) + 2]
    for stops in (stop, [stop], ("never comes", stop)):
        written = Session(model).write(max_tokens=60, stop=stops)
        assert written.encode("utf-8", "surrogateescape") == expected
    with pytest.raises(fastweights.Error, match="stop"):
        Session(model).write(stop=[""])


@pytest.mark.parametrize(
    "option", [{"max_tokens": -1}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0}, {"seed": -1}]
)
def test_impossible_options_are_named(model: LanguageModel, option: dict[str, float]) -> None:
    session = Session(model)
    with pytest.raises(fastweights.Error, match=next(iter(option))):
        session.write(**option)  # type: ignore[arg-type]
    assert session.position == 0


# ---- stopping -----------------------------------------------------------------------------------


def test_progress_can_stop_a_call(model: LanguageModel) -> None:
    session = Session(model, piece=100)
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> bool:
        seen.append((done, total))
        return done < 300

    with pytest.raises(fastweights.Cancelled, match="300 of 1000"):
        session.read(NOISE[:1000], stop)
    assert seen == [(100, 1000), (200, 1000), (300, 1000)]
    expected = Session(model, piece=100)
    expected.read(NOISE[:300])
    assert same_bits(session, expected)
    with pytest.raises(fastweights.Cancelled):
        session.score(NOISE, lambda *_: False)
    with pytest.raises(InterruptedError):
        session.token_bits(NOISE, lambda *_: False)
    session.read(NOISE[:250], lambda *_: None)  # None goes on
    assert session.position == 550


def test_what_a_callback_raises_comes_through(model: LanguageModel) -> None:
    session = Session(model, piece=100)

    def fail(*_: object) -> bool:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        session.read(NOISE[:500], fail)
    assert session.position == 100
    with pytest.raises(ZeroDivisionError, match="mine"):
        session.write(max_tokens=50, on_token=fail)
    assert 100 < session.position < 105  # at most one character was written
    session.write(max_tokens=3)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("call", ["read", "read_and_score", "token_bits"])
def test_ctrl_c_stops_at_a_token_boundary(model: LanguageModel, call: str) -> None:
    session = Session(model, piece=16)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        getattr(session, call)(NOISE * 2000)
    assert session.position % 16 == 0
    expected = Session(model, piece=16)
    expected.read((NOISE * 2000)[: session.position])
    assert same_bits(session, expected)


@pytest.mark.usefixtures("alarm")
def test_ctrl_c_stops_writing(model: LanguageModel) -> None:
    session = Session(model)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        session.write(max_tokens=10**9)
    assert session.position > 0
    expected = Session(model)
    expected.write(max_tokens=session.position)
    assert same_bits(session, expected)


# ---- copies and threads -------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_are_independent(model: LanguageModel, duplicate: type[Session]) -> None:
    session = Session(model)
    session.read("Here we part")
    other = duplicate(session)
    assert same_bits(session, other)
    other.write(max_tokens=5)
    assert (session.position, other.position) == (12, 17)
    assert not same_bits(session, other)


def test_sessions_share_a_model_on_many_threads(model: LanguageModel) -> None:
    native = model.native()

    def run(seed: int) -> Session:
        session = Session(native, piece=100, seed=seed)
        session.read(NOISE[seed : seed + 500])
        session.write(max_tokens=20)
        return session

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [run(seed) for seed in range(4)]
    together: dict[int, Session] = {}

    def work(seed: int) -> None:
        torch.set_num_threads(1)
        together[seed] = run(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(threads)
    assert all(same_bits(alone[seed], together[seed]) for seed in range(4))


def test_a_session_in_use_is_not_entered_again(model: LanguageModel) -> None:
    session = Session(model, piece=100)

    def enter(*_: object) -> None:
        session.read("meanwhile")

    with pytest.raises(fastweights.Error, match="another call"):
        session.read(NOISE[:500], enter)
    with pytest.raises(fastweights.Error, match="another call"):
        session.write(on_token=lambda _: session.position > 0)
    session.read("afterwards")


def test_other_threads_run_while_a_session_reads(model: LanguageModel) -> None:
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    Session(model, piece=3000).read(NOISE * 10)
    done.set()
    thread.join()
    assert ticks > 5


# ---- state files --------------------------------------------------------------------------------


def test_a_saved_session_goes_on_alike(model: LanguageModel, tmp_path: Path) -> None:
    session = Session(model, piece=77, seed=3)
    session.read(NOISE[:500])
    session.write(max_tokens=10)
    path = tmp_path / "a.fwstate"
    session.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    resumed = Session.load(str(path), model)
    assert same_bits(session, resumed)
    assert resumed.log() == session.log()
    assert resumed.write(max_tokens=40) == session.write(max_tokens=40)
    resumed.read(NOISE)
    session.read(NOISE)
    assert same_bits(session, resumed)


def test_it_goes_on_alike_in_another_process(model: LanguageModel, tmp_path: Path) -> None:
    fastweights.save_model(tmp_path / "model", model)
    session = Session(fastweights.load_model(tmp_path / "model"))
    session.read(NOISE[:800])
    session.save(tmp_path / "a.fwstate")
    code = (
        "import sys, fastweights as fw\n"
        "s = fw.Session.load(sys.argv[2], fw.load_model(sys.argv[1]))\n"
        "text = s.write(max_tokens=60)\n"
        "print(text.encode('utf-8', 'surrogateescape').hex(), s.logits().numpy().tobytes().hex())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "a.fwstate")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    written = session.write(max_tokens=60).encode("utf-8", "surrogateescape").hex()
    assert answer.stdout.split() == [written, session.logits().numpy().tobytes().hex()]


def test_files_that_are_not_this_sessions_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "a.fwstate"
    session = Session(model)
    session.read(NOISE[:100])
    session.save(path)
    content = path.read_bytes()
    with pytest.raises(fastweights.StateMismatch, match=r"a\.fwstate.*another model"):
        Session.load(path, small_model(vocabulary_size=256))
    for damaged, why in [
        (content[: len(content) // 2], "cut short"),
        (content[:-1] + bytes([content[-1] ^ 1]), "altered"),
        (b"x" * 100, "no fastweights state file"),
        (b"", "empty"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(fastweights.FileError, match=rf"a\.fwstate.*{why}"):
            Session.load(path, model)
    with pytest.raises(OSError, match="nowhere"):
        Session.load(tmp_path / "nowhere", model)
    with pytest.raises(fastweights.FileError, match="no-folder"):
        session.save(tmp_path / "no-folder" / "a.fwstate")
    path.write_bytes(content)
    assert same_bits(Session.load(path, model), session)
