"""The memory at the head, by its definition, in a model and in a session."""

from pathlib import Path

import pytest
import torch
from comparison import assert_near
from small_models import random_tokens, small_config, small_model
from torch import Tensor

import fastweights
from fastweights import ops
from fastweights.nn import LanguageModelState


def by_definition(
    h: Tensor, logits: Tensor, tokens: Tensor, eta: float, g: float, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """The corrected logits of one row, and the state before its last token is written."""
    keys = h / h.norm(dim=-1, keepdim=True)
    state, rows = h.new_zeros(h.shape[-1], logits.shape[-1]), []
    for t, key in enumerate(keys):
        rows.append(logits[t] + key @ state)
        if t + 1 == len(keys):
            break
        error = -rows[-1].softmax(0)
        error[tokens[t + 1]] += 1.0
        r = strength[t + 1].item()
        state = state * torch.exp(h.new_tensor(g * min(r, 1.0)))
        state = state + min(eta * r, 2.0) * torch.outer(key, error)
    return torch.stack(rows), state


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [17, 0, 23]], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("strengths", [False, True])
def test_pieces_against_the_definition(pieces: list[int], in_place: bool, strengths: bool) -> None:
    h, logits = 3 * torch.randn(2, 40, 12).double(), torch.randn(2, 40, 20).double()
    tokens = torch.randint(20, (2, 40))
    strength = 2 * torch.rand(2, 40) if strengths else torch.ones(2, 40)
    state = torch.zeros(2, 12, 20).double()
    hidden, pending = torch.zeros(2, 12).double(), torch.zeros(2, 20).double()
    rows, begin = [], 0
    for count in pieces:
        part = slice(begin, begin + count)
        given = (state, hidden, pending)
        y, state, hidden, pending = ops.fast_head(
            h[:, part],
            logits[:, part],
            tokens[:, part],
            *given,
            eta=1.5,
            g=-0.05,
            strength=strength[:, part] if strengths else None,
            in_place=in_place,
        )
        after = (state, hidden, pending)
        assert not in_place or all(a is b for a, b in zip(given, after, strict=True))
        rows.append(y)
        begin += count
    for row in range(2):
        wanted, wanted_state = by_definition(
            h[row], logits[row], tokens[row], 1.5, -0.05, strength[row]
        )
        assert_near("logits", torch.cat(rows, 1)[row], wanted, 1e-6)  # of the 1e-6 in the norm
        assert_near("state", state[row], wanted_state, 1e-6)
        assert torch.equal(hidden[row], h[row, -1])
        assert_near("pending", pending[row], wanted[-1], 1e-6)


def test_errors() -> None:
    h, logits, tokens = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3).long()
    state = torch.zeros(2, 4, 5), torch.zeros(2, 4), torch.zeros(2, 5)
    with pytest.raises(fastweights.ShapeError, match=r"fast_head: hidden must be \[B, D\] = \[2"):
        ops.fast_head(h, logits, tokens, state[0], state[2], state[2])
    with pytest.raises(fastweights.ShapeError, match=r"fast_head: tokens must be \[B, T\]"):
        ops.fast_head(h, logits, tokens[:1], *state)
    with pytest.raises(fastweights.ShapeError, match=r"fast_head: strength must be \[B, T\]"):
        ops.fast_head(h, logits, tokens, *state, strength=torch.ones(2, 4))
    with pytest.raises(fastweights.ShapeError, match=r"initial_state must be \[B, D, N\]"):
        ops.fast_head(h, logits, tokens, state[0].transpose(1, 2), *state[1:])


def test_configuration() -> None:
    for changes, message in (
        ({"fast_head_eta": 2.5}, "fast_head_eta must be from 0.0 to 2.0, got 2.5"),
        ({"fast_head_half_life": -1.0}, "fast_head_half_life must be from 0.0 .* got -1.0"),
    ):
        with pytest.raises(fastweights.Error, match=message):
            small_config(fast_head=True, **changes)
    assert small_config().fast_head_decay == 0.0
    decay = torch.tensor(small_config(fast_head_half_life=10.0).fast_head_decay)
    assert_near("decay", (10.0 * decay).exp(), torch.tensor(0.5), 1e-6)


def test_a_trained_model_gets_one_when_it_is_loaded(tmp_path: Path) -> None:
    fastweights.save_model(tmp_path, small_model())
    plain = fastweights.load_model(tmp_path)
    model = fastweights.load_model(tmp_path, fast_head=True, fast_head_eta=0.5)
    assert (plain.config.fast_head, model.config.fast_head) == (False, True)
    assert model.config.fast_head_eta == 0.5
    fastweights.save_model(tmp_path / "again", model)
    assert fastweights.load_model(tmp_path / "again").config == model.config
    with pytest.raises(fastweights.Error, match='unknown key "fast_heat"'):
        fastweights.load_model(tmp_path, fast_heat=True)
    with pytest.raises(fastweights.StateMismatch, match="does not fit its configuration"):
        fastweights.load_model(tmp_path, width=64)


def test_strength_zero_leaves_the_matrix_as_it_is() -> None:
    model = small_model("fast_head")
    with torch.no_grad():
        _, state = model(random_tokens(2, 30))
        tokens = random_tokens(2, 20)
        _, after = model(tokens, state, write_strength=torch.zeros(2, 20))
        plain, _ = model(tokens, state)
        one, _ = model(tokens, state, write_strength=torch.ones(2, 20))
    assert state.head is not None
    assert after.head is not None
    assert torch.equal(after.head.state, state.head.state)
    assert torch.equal(one, plain)


def test_gradients_flow_through_what_was_written() -> None:
    model = small_model("fast_head")
    tokens = random_tokens(1, 12)
    _, state = model(tokens)
    assert state.head is not None
    weight = dict(model.named_parameters())["blocks.0.memory.value.weight"]
    (gradient,) = torch.autograd.grad(state.head.state.square().sum(), weight)
    assert gradient.any()
    detached = state.detach().head
    assert detached is not None
    assert not detached.state.requires_grad


def test_a_state_is_checked_by_name() -> None:
    model = small_model("fast_head")
    state = model.initial_state(1)
    tensors = state.tensors()
    assert list(tensors)[-4:] == ["head.state", "head.hidden", "head.logits", "position"]
    del tensors["head.hidden"]
    with pytest.raises(fastweights.StateMismatch, match=r'"head\.hidden" is missing'):
        LanguageModelState.from_tensors(tensors)
    with pytest.raises(fastweights.StateMismatch, match=r"head\.state must be none"):
        small_model()(random_tokens(1, 3), state)
    with pytest.raises(fastweights.StateMismatch, match=r"head\.state must be \[1, 32, 50\], got"):
        model(random_tokens(1, 3), small_model().initial_state(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_session_learns_with_it(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_model("fast_head", vocabulary_size=256).to(dtype)
    text = bytes(torch.randint(97, 101, (300,)).tolist())
    session = fastweights.Session(model, piece=64)
    session.read(text)
    assert session.fused
    written = session.write(max_tokens=50, seed=1).encode("utf-8", "surrogateescape")
    tokens = torch.tensor(list(text + written))[None]
    with torch.no_grad():
        logits, state = model(tokens)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_near("logits", session.logits(), logits[0, -1], tolerance)
    given = session.state()
    for name, tensor in state.tensors().items():
        if name.startswith("head."):
            assert_near(name, given[name].float(), tensor.float(), tolerance)
    session.save(tmp_path / "state")
    again = fastweights.Session.load(tmp_path / "state", model)
    assert torch.equal(again.state()["head.state"], given["head.state"])
    assert again.write(max_tokens=20) == session.write(max_tokens=20)
