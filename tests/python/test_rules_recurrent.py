"""The in-place form: many tokens at once, and token by token as in decoding."""

import pytest
import torch
from cases import Case, Inputs, make_inputs
from comparison import OUTPUT_TOLERANCE, assert_near
from rules import call_oracle
from torch import Tensor

from fastweights import ops


def call(inputs: Inputs, state: Tensor, use_qk_l2norm: bool = False) -> Tensor:
    q, k, v, g, beta = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta
    if g is None:
        return ops.delta_rule_recurrent_(q, k, v, beta, state, use_qk_l2norm=use_qk_l2norm)
    return ops.gated_delta_rule_recurrent_(q, k, v, g, beta, state, use_qk_l2norm=use_qk_l2norm)


def state_of(inputs: Inputs) -> Tensor:
    assert inputs.initial_state is not None
    return inputs.initial_state.clone()


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("gate", ["none", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 65])
@pytest.mark.parametrize("sizes", [(60, 100), (256, 1), (64, 64)], ids=str)
def test_against_the_oracle(
    gate: str, dtype: torch.dtype, tokens: int, sizes: tuple[int, int]
) -> None:
    case = Case(tokens=tokens, sizes=sizes, gate=gate, dtype=dtype, beta="two", use_qk_l2norm=True)
    inputs = make_inputs(case)
    expected, expected_state = call_oracle(inputs, use_qk_l2norm=True)
    state = state_of(inputs)
    o = call(inputs, state, use_qk_l2norm=True)
    assert o.dtype == dtype
    assert_near("o", o, expected, OUTPUT_TOLERANCE[dtype])
    assert_near("state", state, expected_state, OUTPUT_TOLERANCE[dtype])


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_token_by_token_is_the_same_as_at_once(gate: str) -> None:
    inputs = make_inputs(Case(tokens=9, gate=gate, dtype=torch.float64))
    state, stepped_state = state_of(inputs), state_of(inputs)
    at_once = call(inputs, state)
    steps = []
    for t in range(9):
        tensors = {name: x[:, t : t + 1] for name, x in inputs.tensors().items()}
        steps.append(call(Inputs.of(tensors), stepped_state))
    assert_near("o", torch.cat(steps, 1), at_once, 1e-13)
    assert_near("state", stepped_state, state, 1e-13)


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_state_that_is_a_view_is_written_in_place(gate: str) -> None:
    inputs = make_inputs(Case(tokens=3, gate=gate))
    expected = state_of(inputs)
    call(inputs, expected)
    wide = torch.full((*expected.shape[:-1], 2 * expected.shape[-1]), 7.0)
    view = wide[..., ::2]
    view.copy_(state_of(inputs))
    call(inputs, view)
    assert torch.equal(view, expected)
    assert (wide[..., 1::2] == 7.0).all()
