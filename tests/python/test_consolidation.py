"""Consolidation in Python: the same as in C++, on a model of Python's."""

from pathlib import Path

import pytest
import torch
from small_models import small_model

import fastweights
from fastweights import Consolidation, Session
from fastweights.nn import LanguageModel

WORDS = ["the ", "stone ", "river ", "bends ", "slowly ", "and "]


def chatter(size: int, seed: int) -> str:
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(len(WORDS), (size,), generator=draw).tolist()
    return "".join(WORDS[word] for word in words)[:size]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    return small_model("fast_head", vocabulary_size=256)


@pytest.fixture(scope="module")
def result(model: LanguageModel) -> Consolidation:
    session = Session(model)
    session.read(chatter(4000, 1))
    return session.consolidate(chatter(1500, 2))


def test_a_new_model_of_python_starts_from_what_was_learned(
    model: LanguageModel, result: Consolidation
) -> None:
    assert isinstance(result.model, LanguageModel)
    assert not result.model.training
    trial = chatter(1500, 2)
    assert Session(result.model).score(trial) == result.chosen.trial_bits
    assert Session(model).score(trial) == result.before.trial_bits
    assert result.chosen.trial_bits < result.before.trial_bits
    assert result.chosen in result.trials
    start = result.model.initial_state(2).tensors()["head.state"]
    assert torch.equal(start[0], start[1])
    assert start.abs().sum() > 0


def test_the_python_forward_pass_starts_there_too(result: Consolidation) -> None:
    tokens = torch.tensor([list(b"the stone river")])
    logits = result.model(tokens).logits
    assert logits is not None
    session = Session(result.model)
    session.read(b"the stone river")
    torch.testing.assert_close(session.logits(), logits[0, -1].detach())


def test_the_model_folder_keeps_it(result: Consolidation, tmp_path: Path) -> None:
    fastweights.save_model(tmp_path / "model", result.model)
    loaded = fastweights.load_model(tmp_path / "model")
    assert loaded.config.fast_head_initial_matrix
    assert Session(loaded).score("bends") == Session(result.model).score("bends")


def test_what_it_starts_from_can_be_trained(result: Consolidation) -> None:
    model = result.model.requires_grad_()
    logits = model(torch.tensor([list(b"the stone river")])).logits
    assert logits is not None
    torch.autograd.backward(logits.square().mean())
    assert model.head_initial_matrix is not None
    assert model.head_initial_matrix.grad is not None
    assert model.head_initial_matrix.grad.abs().sum() > 0


def test_a_session_moves_to_another_model(model: LanguageModel, result: Consolidation) -> None:
    session = Session(model)
    session.read(chatter(20, 3))  # few enough that what it started from is still felt
    moved = session.rebase(result.model)
    assert moved.log() == session.log()
    assert moved.score("river") != session.score("river")


def test_what_was_learned_end_to_end_becomes_weights(model: LanguageModel) -> None:
    session = Session(model, end_to_end=True)
    session.read(chatter(4000, 1))
    result = session.consolidate(chatter(1500, 2), memory=False, head=False, rank=8)
    assert result.chosen.feed_forward_share > 0
    assert Session(result.model).score(chatter(1500, 2)) == result.chosen.trial_bits
    old, new = [m.get_submodule("blocks")[-1].feed_forward for m in (model, result.model)]
    change = torch.cat([new.gate.weight - old.gate.weight, new.up.weight - old.up.weight])
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 8
    assert new.down.weight.data_ptr() == old.down.weight.data_ptr()
    with pytest.raises(fastweights.Error, match="no memory"):
        session.consolidate(chatter(1500, 2), memory=False, head=False, feed_forward=False)
    with pytest.raises(fastweights.Error, match="rank must be at least 0, got -2"):
        session.consolidate(chatter(1500, 2), rank=-2)


def test_refusal_and_bad_options_are_errors(model: LanguageModel) -> None:
    session = Session(model)
    session.read(chatter(4000, 1))
    with pytest.raises(fastweights.Error, match="refused; at best the trial text costs"):
        Session(model).consolidate(chatter(500, 2))  # it has learned nothing
    with pytest.raises(fastweights.Error, match="tolerance must be at least 0"):
        session.consolidate(tolerance=-0.1)
    with pytest.raises(fastweights.Cancelled):
        session.consolidate("the river", progress=lambda done, total: False)
