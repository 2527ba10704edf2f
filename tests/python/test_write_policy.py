"""Write policies in Python: the same values, semantics and errors as in C++."""

from pathlib import Path

import pytest
import torch
from small_models import small_model
from small_sessions import NOISE, same_bits

from fastweights import (
    Error,
    Session,
    SessionPool,
    SurpriseGate,
    WritePolicy,
    protect_keys,
)
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


# ---- recursive least squares


def test_least_squares(model: LanguageModel, tmp_path: Path) -> None:
    policy = WritePolicy(ridge=0.5)
    session = Session(model, policy=policy)
    assert session.policy == policy
    session.read(NOISE[:100])
    session.write(max_tokens=20, seed=1)
    covariance = session.state()["layers.0.memory.covariance"]
    assert covariance.dtype == torch.float64
    # The inverse of ridge · I plus what was read: between 0 and 1 / ridge.
    values = torch.linalg.eigvalsh(covariance)
    assert 0 < float(values.min()) < float(values.max()) <= 2.0 + 1e-9
    path = tmp_path / "state.fwstate"
    session.save(path)
    loaded = Session.load(path, model)
    assert loaded.policy == policy
    assert same_bits(loaded, session)
    assert same_bits(session.replayed(model, policy=policy), session)
    assert "layers.0.memory.covariance" not in Session(model).state()


def test_a_ridge_out_of_range(model: LanguageModel) -> None:
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(Error, match="ridge must be at least 0"):
            Session(model, policy=WritePolicy(ridge=bad))
    with pytest.raises(Error, match="no place beside a ridge"):
        Session(model, policy=WritePolicy(ridge=1.0, memory_norm_cap=2.0))


# ---- protected keys


@pytest.fixture(scope="module")
def learned() -> LanguageModel:
    """A model whose memories begin with matrices that are not zero."""
    torch.manual_seed(2)
    model = small_model(vocabulary_size=256, memory_initial_matrix=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("initial_matrix"):
                parameter.normal_()
    return model


def test_what_is_protected_stays(learned: LanguageModel, tmp_path: Path) -> None:
    protection = protect_keys(learned, NOISE[:200], share=1.0, most=3)
    first = Session(learned).state()["layers.0.memory.state"]
    session = Session(learned, protection=protection)
    plain = Session(learned)
    for each in (session, plain):
        each.read(NOISE * 3)
        each.write(max_tokens=10, seed=1)

    def part(state: torch.Tensor) -> torch.Tensor:
        return protection.projectors[0] @ state

    def moved(each: Session) -> float:
        now = part(each.state()["layers.0.memory.state"])
        return float((now - part(first)).norm() / part(first).norm())

    assert moved(session) < 1e-5
    assert moved(plain) > 0.1
    size = protection.projectors[0].shape[-1]
    assert (protection.free_ranks() == size - 3).all()
    kept = session.protection
    assert kept is not None
    assert kept.least_free == protection.least_free
    assert all(
        torch.equal(a, b) for a, b in zip(kept.projectors, protection.projectors, strict=True)
    )
    path = tmp_path / "state.fwstate"
    session.save(path)
    loaded = Session.load(path, learned)
    assert same_bits(loaded, session)
    assert loaded.report().refused_writes == session.report().refused_writes
    assert same_bits(session.replayed(learned, protection=protection), session)
    assert Session(learned).protection is None


def test_writes_with_little_that_is_free_are_refused(learned: LanguageModel) -> None:
    size = protect_keys(learned, NOISE[:50]).projectors[0].shape[-1]
    tight = protect_keys(learned, NOISE[:200], share=1.0, most=size - 1, least_free=0.5)
    session = Session(learned, protection=tight)
    session.read(NOISE[:100])
    assert session.report().refused_writes > 0
    assert Session(learned).report().refused_writes == 0


def test_a_protection_that_does_not_fit(learned: LanguageModel) -> None:
    protection = protect_keys(learned, NOISE[:50])
    for bad in (
        protection._replace(projectors=protection.projectors[1:]),
        protection._replace(projectors=[each * 2 for each in protection.projectors]),
        protection._replace(projectors=[each.double() for each in protection.projectors]),
        protection._replace(least_free=2.0),
    ):
        with pytest.raises(Error, match="protection"):
            Session(learned, protection=bad)
    for options in ({"share": 0.0}, {"most": 1000}, {"least_free": 1.0}):
        with pytest.raises(Error, match="protect_keys"):
            protect_keys(learned, NOISE[:50], **options)  # type: ignore[arg-type]
    with pytest.raises(Error, match="an empty text"):
        protect_keys(learned, "")


def test_a_pool_protects(learned: LanguageModel) -> None:
    protection = protect_keys(learned, NOISE[:100])
    pool = SessionPool(learned, protection=protection)
    pool.create("one")
    pool.read("one", NOISE[:60])
    pool.write("one", max_tokens=20, seed=1)
    lone = Session(pool.model, protection=protection)
    lone.read(NOISE[:60])
    lone.write(max_tokens=20, seed=1)
    assert pool.use("one", lambda session: same_bits(session, lone))
