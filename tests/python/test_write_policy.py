"""Write policies in Python: the same values, semantics and errors as in C++."""

from pathlib import Path

import pytest
import torch
from small_models import small_model
from small_sessions import NOISE, same_bits

from fastweights import Error, Session, SessionPool, SurpriseGate, WritePolicy
from fastweights.nn import LanguageModel
from fastweights.session import Strength
from fastweights.write_policy import AS_TRAINED, FROZEN


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    return small_model(vocabulary_size=256)


def norms(session: Session) -> torch.Tensor:
    states = [t for name, t in session.state().items() if name.endswith("memory.state")]
    return torch.cat([state.norm(dim=(-2, -1)).flatten() for state in states])


def test_a_strength_is_feedback_to_everything(model: LanguageModel) -> None:
    plain = Session(model, piece=16)
    plain.read(NOISE[:100])
    assert plain.policy == AS_TRAINED
    plain.feedback(0, 0.5)
    session = Session(model, piece=16, policy=WritePolicy(strength=0.5))
    session.read(NOISE[:100])
    assert same_bits(session, plain)
    assert session.policy == WritePolicy(strength=0.5)
    assert session.strengths() == []  # of the log


def test_frozen(model: LanguageModel) -> None:
    session = Session(model, policy=FROZEN)
    session.read(NOISE[:100])
    session.write(max_tokens=20)
    assert norms(session).max() == 0
    assert session.position == 120


def test_surprise_matters(model: LanguageModel) -> None:
    gate = SurpriseGate(low=2.0, high=12.0, least=0.2, most=1.2)
    session = Session(model, piece=16, policy=WritePolicy(surprise=gate))
    plain = Session(model, piece=16)
    for each in (session, plain):
        each.read(NOISE[:100])
    assert not same_bits(session, plain)
    assert session.policy == WritePolicy(surprise=pytest.approx(gate))  # type: ignore[arg-type]
    flat = Session(model, piece=16, policy=WritePolicy(surprise=SurpriseGate(0, 1, 0.5, 0.5)))
    half = Session(model, piece=16, policy=WritePolicy(strength=0.5))
    for each in (flat, half):
        each.read(NOISE[:100])
    assert same_bits(flat, half)


def test_caps_hold_and_are_counted(model: LanguageModel, tmp_path: Path) -> None:
    plain = Session(model, piece=16)
    plain.read(NOISE[:200])
    cap = float(norms(plain).max()) / 2
    session = Session(model, piece=16, policy=WritePolicy(memory_norm_cap=cap))
    session.read(NOISE[:200])
    session.write(max_tokens=10, seed=1)
    assert norms(session).max() <= cap * (1 + 1e-5)
    count = session.report().capped_norms
    assert count > 0
    assert plain.report().capped_norms == 0
    session.save(tmp_path / "a.fwstate")
    loaded = Session.load(tmp_path / "a.fwstate", model)
    assert loaded.policy == session.policy
    assert loaded.report() == session.report()
    loaded.rollback(100)
    session.rollback(100)
    assert same_bits(loaded, session)
    assert same_bits(session.replayed(model, piece=16, policy=session.policy), session)


def test_a_pool_s_sessions_have_its_policy(model: LanguageModel) -> None:
    policy = WritePolicy(strength=0.5, memory_norm_cap=0.2)
    pool = SessionPool(model, piece=16, policy=policy)
    pool.create("a")
    pool.read("a", NOISE[:50])
    alone = Session(model, piece=16, policy=policy)
    alone.read(NOISE[:50])
    assert pool.write("a", max_tokens=20, seed=1) == alone.write(max_tokens=20, seed=1)
    assert pool.use("a", lambda session: same_bits(session, alone))


def test_reward(model: LanguageModel) -> None:
    session = Session(model, piece=16)
    session.read(NOISE[:40])
    session.reward(-1.0, half_life=1.0)
    # 64 · 2^−7 = ½ is rounded away from 0.
    assert session.strengths()[0] == Strength(32, 34, 63 / 64)
    assert session.strengths()[-3:] == [
        Strength(37, 38, 0.75),
        Strength(38, 39, 0.5),
        Strength(39, 40, 0.0),
    ]
    session.feedback(0, 1.0)
    session.reward(1.0)
    assert session.strengths()[-1].strength == 2.0
    with pytest.raises(Error, match="reward must be in"):
        session.reward(2.0)
    with pytest.raises(Error, match="half-life"):
        session.reward(1.0, half_life=0)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (WritePolicy(strength=3), "strength must be in"),
        (WritePolicy(memory_norm_cap=-1), "memory_norm_cap must be at least 0"),
        (WritePolicy(head_norm_cap=float("nan")), "head_norm_cap must be at least 0"),
        (WritePolicy(surprise=SurpriseGate(2, 1)), "low must be below high"),
        (WritePolicy(surprise=SurpriseGate(most=5)), "most must be in"),
    ],
)
def test_out_of_range(model: LanguageModel, policy: WritePolicy, message: str) -> None:
    with pytest.raises(Error, match=message):
        Session(model, policy=policy)
    with pytest.raises(Error, match=message):
        SessionPool(model, policy=policy).create("a")


def test_numbers_that_are_not_finite(model: LanguageModel) -> None:
    torch.manual_seed(1)
    broken = small_model(vocabulary_size=256, tie_embeddings=False)
    with torch.no_grad():
        broken.embedding.weight[7].fill_(float("nan"))
    session = Session(broken, piece=16)
    session.read("a" * 40)
    before = session.fork()
    with pytest.raises(Error, match="not finite any more"):
        session.read(b"ab\x07")
    assert same_bits(session, before)
