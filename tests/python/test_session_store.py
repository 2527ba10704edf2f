"""Sessions with an exact store behind them."""

from pathlib import Path

import pytest
import torch
from small_models import small_model
from small_sessions import NOISE, same_bits

from fastweights import Error, ExactStore, ExactStoreOptions, Session

OPTIONS = ExactStoreOptions(neighbours=8, neighbour_bytes=4 * 256 * 65)


def test_a_session_recalls_a_passage_with_a_store_only() -> None:
    model = small_model(vocabulary_size=256, initializer_range=0.05)
    passage, between = NOISE[:150], NOISE[150:1500]
    costs = {}
    for store in (False, True):
        session = Session(model, store=store)
        session.read(passage)
        session.read(between)
        costs[store] = session.score(passage)
    assert costs[True] < costs[False] - 4


def test_options_are_those_given() -> None:
    model = small_model(vocabulary_size=256, initializer_range=0.05)
    assert Session(model).store is None
    assert Session(model, store=True).store == ExactStoreOptions()
    assert Session(model, store=OPTIONS).store == OPTIONS
    with pytest.raises(Error, match="candidates must be"):
        Session(model, store=OPTIONS._replace(candidates=65))


def test_a_session_with_a_store_is_saved_and_goes_on_alike(tmp_path: Path) -> None:
    model = small_model(vocabulary_size=256, initializer_range=0.05).native()
    session = Session(model, piece=64, store=OPTIONS)
    session.read(NOISE)
    session.write(max_tokens=50)
    session.save(tmp_path / "a.fwstate")
    again = Session.load(tmp_path / "a.fwstate", model)
    assert again.store == OPTIONS
    assert same_bits(session, again)
    for each in (session, again):
        each.rollback(500)
        each.read(b"and on")
    assert same_bits(session, again)
    fresh = Session(model, piece=64, store=OPTIONS)
    fresh.read(NOISE[:500])
    fresh.read(b"and on")
    assert same_bits(session, fresh)


def test_a_log_is_replayed_with_or_without_a_store() -> None:
    model = small_model(vocabulary_size=256, initializer_range=0.05).native()
    session = Session(model, store=OPTIONS)
    session.read(NOISE[:700])
    assert same_bits(session.replayed(model, store=OPTIONS), session)
    plain = Session(model)
    plain.read(NOISE[:700])
    assert same_bits(session.replayed(model), plain)


def test_the_store_of_a_session_can_be_taken_out() -> None:
    model = small_model(vocabulary_size=256, initializer_range=0.05)
    session = Session(model, store=OPTIONS)
    session.read(NOISE[:700])
    state = session.state()
    store = ExactStore.from_tensors(model.config.width, model.config.vocabulary_size, state)
    assert len(store) == session.report().store_tokens == 700
    log_p = store.predict(state["store.hidden"], state["store.logits"])
    assert torch.equal(log_p, session.logits())
