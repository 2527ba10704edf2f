"""fastweights.ExactStore: the C++ tests look at what it computes, these at its Python face."""

import copy
import math

import pytest
import torch
from torch import Tensor

from fastweights import Error, ExactStore, FileError, ShapeError, StateMismatch

HIDDEN, VOCABULARY = 24, 13


def make_stream(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that repeat, hidden states that know a little, logits that know nothing."""
    first = torch.randint(VOCABULARY, (size // 3,))
    tokens = torch.cat([first, torch.randint(VOCABULARY, (size - 2 * len(first),)), first])
    hidden = torch.randn(size, HIDDEN)
    hidden[torch.arange(size), tokens] += 1.5
    return tokens, hidden, torch.randn(size, VOCABULARY)


def make_store(**options: int) -> ExactStore:
    return ExactStore(HIDDEN, VOCABULARY, **options)


def bits(log_p: Tensor, tokens: Tensor) -> float:
    return -log_p.gather(1, tokens[:, None]).mean().item() / math.log(2)


def test_reading_predicts_better_than_the_model_alone() -> None:
    tokens, hidden, logits = make_stream(3000)
    model = bits(logits.log_softmax(1), tokens)
    both = bits(make_store().read(tokens, hidden, logits), tokens)
    match = bits(make_store(neighbour_bytes=0).read(tokens, hidden, logits), tokens)
    neither = make_store(neighbour_bytes=0, text_bytes=0).read(tokens, hidden, logits)
    assert both < match - 0.1 < model - 0.5
    torch.testing.assert_close(neither, logits.log_softmax(1))


def test_batches_steps_and_threads_give_the_same_bits() -> None:
    tokens, hidden, logits = make_stream(700)
    whole = make_store().read(tokens, hidden, logits)
    store = make_store()
    for t in range(len(tokens)):
        assert torch.equal(store.predict(hidden[t], logits[t]), whole[t])
        store.read(tokens[t : t + 1], hidden[t : t + 1], logits[t : t + 1])
    torch.set_num_threads(2)
    again = make_store()
    assert torch.equal(again.read(tokens, hidden, logits), whole)
    assert len(store) == len(again) == 700
    assert store.nbytes == again.nbytes


def test_copies_checkpoints_and_tensors_bring_a_store_back() -> None:
    tokens, hidden, logits = make_stream(900)
    store = make_store()
    store.read(tokens[:400], hidden[:400], logits[:400])
    before = copy.copy(store)
    checkpoint = store.checkpoint()
    loaded = ExactStore.from_tensors(HIDDEN, VOCABULARY, store.tensors())
    expected = store.read(tokens[400:], hidden[400:], logits[400:])
    store.rollback(checkpoint)
    assert checkpoint.size == len(store) == 400
    for other in (before, loaded, store, copy.deepcopy(store)):
        assert torch.equal(other.read(tokens[400:], hidden[400:], logits[400:]), expected)


def test_tokens_of_strength_zero_leave_nothing_to_find() -> None:
    tokens, hidden, logits = make_stream(600)
    store = make_store()
    out = store.read(tokens, hidden, logits, torch.zeros(600))
    torch.testing.assert_close(out, logits.log_softmax(1))
    assert store.tensors()["store.keys"].shape == (0, 64)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    tokens, hidden, logits = make_stream(9)
    store = make_store()
    with pytest.raises(ShapeError, match="tokens"):
        store.read(tokens.int(), hidden, logits)
    with pytest.raises(ShapeError, match="tokens"):
        store.read(tokens[None], hidden, logits)
    with pytest.raises(ShapeError, match="hidden"):
        store.read(tokens, hidden[:, 1:], logits)
    with pytest.raises(ShapeError, match="hidden"):
        store.read(tokens, hidden.T.contiguous().T, logits)
    with pytest.raises(ShapeError, match="logits"):
        store.read(tokens, hidden, logits.double())
    with pytest.raises(ShapeError, match="strengths"):
        store.read(tokens, hidden, logits, torch.ones(8))
    with pytest.raises(Error, match="token"):
        store.read(tokens + VOCABULARY, hidden, logits)
    with pytest.raises(ShapeError, match="hidden"):
        store.predict(hidden, logits[0])
    with pytest.raises(Error, match="shortest"):
        make_store(shortest=0)
    assert len(store) == 0


def test_tensors_of_another_store_are_refused() -> None:
    tensors = make_store().tensors()
    with pytest.raises(StateMismatch, match="sizes"):
        ExactStore.from_tensors(HIDDEN + 1, VOCABULARY, tensors)
    with pytest.raises(FileError, match=r"store\.text"):
        ExactStore.from_tensors(
            HIDDEN, VOCABULARY, {n: t for n, t in tensors.items() if n != "store.text"}
        )
