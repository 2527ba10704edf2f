"""Learning end to end from Python: its options, its state, and that it learns."""

from pathlib import Path

import pytest
import torch
from small_models import small_model
from small_sessions import NOISE, same_bits
from torch.nn import functional

from fastweights import EndToEndOptions, Error, Session, SessionPool
from fastweights.nn import LanguageModel

DELTA = "end_to_end.delta"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    return small_model(vocabulary_size=256)


def test_a_step_is_that_of_autograd(model: LanguageModel) -> None:
    every = 16
    options = EndToEndOptions(learning_rate=2.0, every=every, clip=0.5)
    session = Session(model, end_to_end=options)
    session.read(NOISE[: every + 1])
    tokens = torch.tensor(list(NOISE[: every + 1])).unsqueeze(0)
    logits = model(tokens[:, :every]).logits
    assert logits is not None
    layer = model.blocks[-1].feed_forward
    weights = [layer.gate.weight, layer.up.weight]
    loss = functional.cross_entropy(logits[0], tokens[0, 1:])
    gradient = torch.cat(torch.autograd.grad(loss, weights))
    expected = gradient * (-2.0 * min(1.0, 0.5 / float(gradient.norm())))
    torch.testing.assert_close(session.state()[DELTA], expected, rtol=1e-3, atol=1e-6)


def test_its_options(model: LanguageModel) -> None:
    assert Session(model).end_to_end is None
    assert DELTA not in Session(model).state()
    assert Session(model, end_to_end=True).end_to_end == EndToEndOptions()
    options = EndToEndOptions(learning_rate=0.5, every=8, clip=2.0)
    assert Session(model, end_to_end=options).end_to_end == options
    for bad in (
        options._replace(learning_rate=-1.0),
        options._replace(every=0),
        options._replace(clip=float("inf")),
    ):
        with pytest.raises(Error, match="end_to_end"):
            Session(model, end_to_end=bad)
        with pytest.raises(Error, match="end_to_end"):
            SessionPool(model, end_to_end=bad).create("one")


def test_it_is_kept_with_the_session(model: LanguageModel, tmp_path: Path) -> None:
    session = Session(model, end_to_end=EndToEndOptions(every=8))
    session.read(NOISE[:100])
    session.write(max_tokens=30, seed=1)
    path = tmp_path / "state.fwstate"
    session.save(path)
    loaded = Session.load(path, model)
    assert loaded.end_to_end == session.end_to_end
    assert same_bits(loaded, session)
    assert same_bits(session.replayed(model, end_to_end=session.end_to_end or False), session)
    loaded.rollback(50)
    fresh = Session(model, end_to_end=EndToEndOptions(every=8))
    fresh.read(NOISE[:50])
    torch.testing.assert_close(loaded.state()[DELTA], fresh.state()[DELTA])


def test_slow_weights_stay_as_they_are(model: LanguageModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session = Session(model, end_to_end=True)
    session.read(NOISE[:200])
    assert float(session.state()[DELTA].norm()) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_in_a_pool(model: LanguageModel) -> None:
    pool = SessionPool(model, end_to_end=EndToEndOptions(every=8))
    pool.create("one")
    pool.read("one", NOISE[:50])
    pool.write("one", max_tokens=20, seed=1)
    lone = Session(pool.model, end_to_end=EndToEndOptions(every=8))
    lone.read(NOISE[:50])
    lone.write(max_tokens=20, seed=1)
    assert pool.use("one", lambda session: same_bits(session, lone))
