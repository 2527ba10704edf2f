"""States in bf16: those of a call in fp32, widened before and rounded to nearest even after."""

from typing import Any

import family
import pytest
import torch
from cases import Case, make_inputs
from comparison import assert_near
from family import NAMES, WRITES, FamilyCase, Tensors
from small_models import small_model
from torch import Tensor

import fastweights
from fastweights import ops
from fastweights.nn import LanguageModelState

RULES = ("delta_rule", "gated_delta_rule", *NAMES)
PACKED = torch.tensor([0, 3, 3, 20, 65])


def make(rule: str, **settings: Any) -> Tensors:
    """A call's tensors by name; states in bf16."""
    if rule in NAMES:
        tensors = family.make(FamilyCase(rule, Case(gate="mixed", **settings)))
    else:
        gate = "none" if rule == "delta_rule" else "mixed"
        tensors = make_inputs(Case(gate=gate, **settings)).tensors()
    return {name: x.bfloat16() if name.startswith("initial") else x for name, x in tensors.items()}


def widened(tensors: Tensors) -> Tensors:
    return {
        name: x.detach().float() if name.startswith("initial") else x for name, x in tensors.items()
    }


def call(rule: str, tensors: Tensors, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    if rule in NAMES:
        return family.call(rule, tensors, **options)
    o, state = getattr(ops, rule)(**tensors, output_final_state=True, **options)
    return o, (state,)


def call_recurrent(rule: str, tensors: Tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
    states = tuple(x.clone() for name, x in tensors.items() if name.startswith("initial"))
    function = getattr(ops, rule + "_recurrent_")
    if rule not in NAMES:
        order = ["q", "k", "v", "beta"] if rule == "delta_rule" else ["q", "k", "v", "g", "beta"]
        inputs = [tensors[name] for name in order]
        return function(*inputs, *states), states
    positional, _ = family.arguments(rule, tensors)
    if rule == "momentum_delta_rule":
        return function(*positional[:7], states, positional[7]), states
    if rule == "gated_delta_product":
        return function(*positional[:5], *states, WRITES), states
    return function(*positional, *states), states


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_rounds_once(rule: str, dtype: torch.dtype, packed: bool) -> None:
    tensors = make(rule, dtype=dtype, cu_seqlens=tuple(PACKED.tolist()) if packed else None)
    options = {"cu_seqlens": PACKED if packed else None}
    o, states = call(rule, tensors, **options)
    expected, wide = call(rule, widened(tensors), **options)
    assert torch.equal(o, expected)
    for state, exact in zip(states, wide, strict=True):
        assert state.dtype == torch.bfloat16
        assert torch.equal(state, exact.bfloat16())


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(64, 64), (20, 70), (128, 33), (3, 1)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 9])
def test_recurrent_rounds_once(rule: str, sizes: tuple[int, int], tokens: int) -> None:
    tensors = make(rule, tokens=tokens, sizes=sizes)
    o, states = call_recurrent(rule, tensors)
    expected, wide = call_recurrent(rule, widened(tensors))
    assert torch.equal(o, expected)
    for state, exact in zip(states, wide, strict=True):
        assert torch.equal(state, exact.bfloat16())


@pytest.mark.parametrize("sizes", [(64, 64), (4, 33)], ids=str)
def test_numbers_that_are_not_finite_stay_what_they_are(sizes: tuple[int, int]) -> None:
    tensors = make("gated_delta_rule", tokens=1, sizes=sizes)
    state = tensors["initial_state"]
    state[0, 0, 0, 0], state[0, 1, 1, -1], state[1, 2, 2, 0] = torch.nan, torch.inf, -torch.inf
    largest = torch.finfo(torch.bfloat16).max
    state[1, 3, 3, -1] = largest
    _, (after,) = call_recurrent("gated_delta_rule", tensors)
    _, (wide,) = call_recurrent("gated_delta_rule", widened(tensors))
    assert torch.equal(after.isnan(), wide.isnan())
    assert torch.equal(after.nan_to_num(), wide.bfloat16().nan_to_num())


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_the_states_are_rounded(rule: str) -> None:
    tensors = make(rule)
    wide = widened(tensors)
    gradients = []
    for given in (tensors, wide):
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        o, states = call(rule, leaves)
        loss = o.square().sum() + sum(2 * state.float().sum() for state in states)
        gradients.append(torch.autograd.grad(loss, list(leaves.values())))
    for name, gradient, exact in zip(tensors, *gradients, strict=True):
        assert gradient.dtype == tensors[name].dtype
        assert torch.equal(gradient, exact.to(gradient.dtype)), name


def test_a_call_of_one_token_costs_at_most_one_rounding() -> None:
    tensors = make("gated_delta_rule", tokens=300)
    state = tensors["initial_state"].clone()
    exact = widened(tensors)["initial_state"]
    inputs = [tensors[name] for name in ("q", "k", "v", "g", "beta")]
    for t in range(300):
        token = [x[:, t : t + 1] for x in inputs]
        ops.gated_delta_rule_recurrent_(*token, state)
        ops.gated_delta_rule_recurrent_(*token, exact)
    assert_near("state", state, exact, 1e-2)


def test_types_that_do_not_go_together_are_refused() -> None:
    tensors = make("gated_delta_rule", dtype=torch.float64)
    with pytest.raises(fastweights.ShapeError, match="initial_state must be Double, got BFloat16"):
        ops.gated_delta_rule(**tensors)
    tensors = make("momentum_delta_rule")
    tensors["initial_momentum"] = tensors["initial_momentum"].float()
    message = "initial_momentum must be BFloat16, got Float"
    with pytest.raises(fastweights.ShapeError, match=message):
        call("momentum_delta_rule", tensors)


@pytest.mark.parametrize("rule", ["gated_delta_rule", "momentum_delta_rule"])
def test_opcheck(rule: str) -> None:
    tensors = make(rule, tokens=5, sizes=(3, 4))
    if rule == "gated_delta_rule":
        positional: list[Any] = [tensors[name] for name in ("q", "k", "v", "g", "beta")]
        options: dict[str, Any] = {"initial_state": tensors["initial_state"]}
    else:
        positional = list(family.arguments(rule, tensors)[0])
        options = {name: x for name, x in tensors.items() if name.startswith("initial")}
    for x in [*positional, *options.values()]:
        if x is not None:
            x.requires_grad_()
    options["output_final_state"] = True
    torch.library.opcheck(getattr(torch.ops.fastweights, rule).default, (*positional,), options)


def test_models_keep_their_states_in_fp32() -> None:
    model = small_model()
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    tensors = model.initial_state(1).tensors()
    narrow = {n: x.bfloat16() if n.endswith("memory.state") else x for n, x in tensors.items()}
    state = LanguageModelState.from_tensors(narrow)
    message = "fast_weight_memory: state must be Float, got BFloat16"
    with pytest.raises(fastweights.ShapeError, match=message):
        model(tokens, state)
