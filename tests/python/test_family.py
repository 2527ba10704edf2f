"""The rules beside the two delta rules: outputs, states and gradients against the fp64 oracle, and
their place among PyTorch's tools."""

import itertools
from typing import Any

import pytest
import torch
from cases import Case, pairwise
from comparison import (
    GATE_GRADIENT_TOLERANCE,
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    assert_near,
)
from family import (
    GATES,
    NAMES,
    OPERATORS,
    WRITES,
    FamilyCase,
    Tensors,
    arguments,
    call,
    expected,
    make,
)
from rules import loss_of, threads
from torch import Tensor

from fastweights import ops
from fastweights.errors import ShapeError

SETTINGS = {
    "tokens": (0, 1, 7, 8, 9, 63, 64, 65, 300),
    "sizes": ((64, 64), (60, 100), (100, 60), (256, 1), (1, 256), (128, 32)),
    "heads": ((1, 1), (2, 2), (2, 4)),
    "gate": ("mild", "mixed", "0", "-50"),
    "beta": ("unit", "two", "mixed"),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "gates_in_fp32": (False, True),
    "initial_state": (False, True),
    "use_qk_l2norm": (False, True),
    "contiguous": (True, False),
}


def sweep() -> list[FamilyCase]:
    cases = []
    for index, rule in enumerate(NAMES):
        for settings in itertools.islice(pairwise(SETTINGS, seed=index), 60):
            # Normalising a single number gives ±1, and a gradient that is all cancellation.
            if settings["sizes"][0] == 1:
                settings["use_qk_l2norm"] = False
            cases.append(FamilyCase(rule, Case(**settings)))
        cases.append(FamilyCase(rule, Case(tokens=65, cu_seqlens=(0, 0, 9, 9, 50, 65, 65))))
    cases.append(FamilyCase("linear_attention", Case(gate="none")))
    cases.append(FamilyCase("gated_delta_product", Case(gate="none")))
    return cases


def leaves(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    return {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for name, tensor in tensors.items()
    }


def loss(o: Tensor, states: tuple[Tensor, ...]) -> Tensor:
    total = loss_of(o, states[0])
    return total if len(states) == 1 else total + loss_of(o, states[1], seed=2)


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("family", sweep(), ids=str)
def test_outputs_states_and_gradients(family: FamilyCase) -> None:
    rule, case = family.rule, family.case
    given = leaves(make(family))
    exact = leaves(given, torch.float64)
    options: dict[str, Any] = {"use_qk_l2norm": case.use_qk_l2norm}
    options["cu_seqlens"] = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)
    with threads(2):
        o, states = call(rule, given, **options)
        gradients = torch.autograd.grad(
            loss(o, states), list(given.values()), materialize_grads=True
        )
    exact_o, exact_states = expected(rule, exact, **options)
    exact_gradients = torch.autograd.grad(
        loss(exact_o, exact_states), list(exact.values()), materialize_grads=True
    )
    assert o.dtype == case.dtype
    assert_near("o", o, exact_o, OUTPUT_TOLERANCE[case.dtype])
    for state, exact_state in zip(states, exact_states, strict=True):
        assert state.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        assert_near("state", state, exact_state, OUTPUT_TOLERANCE[case.dtype])
    for name, gradient, exact_gradient in zip(given, gradients, exact_gradients, strict=True):
        tolerances = GATE_GRADIENT_TOLERANCE if name in GATES else GRADIENT_TOLERANCE
        assert gradient.dtype == given[name].dtype
        tolerance = max(tolerances[case.dtype], tolerances[gradient.dtype])
        assert_near(f"d{name}", gradient, exact_gradient, tolerance)


def small(rule: str, **settings: Any) -> Tensors:
    defaults: dict[str, Any] = {"tokens": 5, "sizes": (3, 4), "heads": (1, 2)}
    return make(FamilyCase(rule, Case(**defaults | settings)))


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(rule: str, packed: bool) -> None:
    cu_seqlens = (0, 2, 2, 5) if packed else None
    tensors = leaves(small(rule, dtype=torch.float64, cu_seqlens=cu_seqlens))
    packing = None if cu_seqlens is None else torch.tensor(cu_seqlens)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(tensors, values, strict=True))
        o, states = call(rule, named, cu_seqlens=packing, use_qk_l2norm=packed)
        return (o, *states)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def dispatched(rule: str, tensors: Tensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the operator under ``torch.ops``."""
    positional, options = arguments(rule, tensors)
    options = {name: tensors[name] for name in tensors if name.startswith("initial")}
    return positional, options | {"output_final_state": True}


@pytest.mark.parametrize("rule", OPERATORS)
def test_opcheck(rule: str) -> None:
    positional, options = dispatched(rule, leaves(small(rule)))
    operator = getattr(torch.ops.fastweights, rule).default
    torch.library.opcheck(operator, positional, options)
    torch.library.opcheck(operator, positional)


@pytest.mark.parametrize("rule", OPERATORS)
def test_opcheck_of_the_recurrent_form(rule: str) -> None:
    tensors = small(rule)
    states = [tensors[name] for name in tensors if name.startswith("initial")]
    positional, _ = arguments(rule, tensors)
    operator = getattr(torch.ops.fastweights, rule + "_recurrent_").default
    torch.library.opcheck(operator, (*positional, *states))


@pytest.mark.parametrize("rule", NAMES)
def test_recurrent_form_in_place(rule: str) -> None:
    tensors = make(FamilyCase(rule, Case(tokens=19)))
    o, states = call(rule, tensors)
    positional, options = arguments(rule, tensors)
    given: Any = options["initial_state"]
    working = [x.clone() for x in (given if isinstance(given, tuple) else (given,))]
    recurrent = getattr(ops, rule + "_recurrent_")
    state = tuple(working) if rule == "momentum_delta_rule" else working[0]
    if rule == "momentum_delta_rule":
        mine = recurrent(*positional[:7], state, positional[7])
    elif rule == "gated_delta_product":
        mine = recurrent(*positional[:5], state, WRITES)
    else:
        mine = recurrent(*positional, state)
    assert_near("o", mine, o, 1e-5)
    for got, last in zip(working, states, strict=True):
        assert_near("state", got, last, 1e-5)


@pytest.mark.parametrize("rule", NAMES)
def test_compile_without_graph_breaks(rule: str) -> None:
    tensors = leaves(small(rule))

    def function(named: Tensors) -> Tensor:
        o, states = call(rule, named)
        return o.square().sum() + sum(state.square().sum() for state in states)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(tensors), list(tensors.values()))
    eager = torch.autograd.grad(function(tensors), list(tensors.values()))
    for a, b in zip(mine, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", NAMES)
def test_autocast_takes_keys_and_values_down(rule: str) -> None:
    tensors = small(rule)
    with torch.autocast("cpu", torch.bfloat16):
        o, states = call(rule, tensors)
    assert o.dtype == torch.bfloat16
    assert all(state.dtype == torch.float32 for state in states)
    assert_near("o", o, expected(rule, tensors)[0], 2e-2)


@pytest.mark.parametrize("rule", OPERATORS)
def test_vmap_is_a_loop(rule: str) -> None:
    tensors = small(rule)
    stacked = {name: torch.stack([x, x.flip(0)]) for name, x in tensors.items()}

    def function(named: Tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
        return call(rule, named)

    o, states = torch.vmap(function)(stacked)
    for i in range(2):
        one, last = function({name: x[i] for name, x in stacked.items()})
        torch.testing.assert_close(o[i], one)
        for got, exact in zip(states, last, strict=True):
            torch.testing.assert_close(got[i], exact)


@pytest.mark.parametrize("rule", NAMES)
def test_threads_change_no_bit(rule: str) -> None:
    case = Case(tokens=40, sizes=(32, 64), heads=(1, 1))
    results = []
    for count in (1, 2):
        tensors = leaves(make(FamilyCase(rule, case)))
        with threads(count):
            o, states = call(rule, tensors)
            results.append((o, *states, *torch.autograd.grad(loss(o, states), [*tensors.values()])))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rule", NAMES)
def test_errors_name_the_tensor(rule: str) -> None:
    tensors = small(rule)
    for name in NAMES[rule]:
        wrong = tensors | {name: tensors[name][:, 1:]} if name in tensors else None
        if wrong is not None:
            with pytest.raises(ShapeError, match=rf"{'generalized' if rule == 'rwkv7' else rule}"):
                call(rule, wrong)
    with pytest.raises(ShapeError, match="initial_state must be"):
        call(rule, tensors | {"initial_state": tensors["initial_state"][..., 1:]})


@pytest.mark.parametrize("rule", OPERATORS)
def test_forward_mode_is_refused(rule: str) -> None:
    tensors = small(rule)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors["v"], torch.ones_like(tensors["v"]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(rule, tensors | {"v": dual})


def test_momentum_without_momentum_is_linear_attention_of_errors() -> None:
    """With μ = 0, η = β and a full step the rule is the delta rule on the undecayed state."""
    tensors = small("momentum_delta_rule", tokens=20)
    tensors["mu"] = torch.zeros_like(tensors["mu"])
    tensors["g"] = torch.zeros_like(tensors["g"])
    strength = tensors["eta"]
    tensors["beta"] = torch.ones_like(strength)
    tensors.pop("p", None)
    o, states = call("momentum_delta_rule", tensors)
    delta_o, delta_state = ops.delta_rule(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        strength,
        initial_state=tensors["initial_state"],
        output_final_state=True,
    )
    assert delta_state is not None
    assert_near("o", o, delta_o, 1e-5)
    assert_near("state", states[0], delta_state, 1e-5)
