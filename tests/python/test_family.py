"""The rules beside the two delta rules: outputs, states and gradients against the fp64 oracle, and
their place among PyTorch's tools."""

import itertools
from typing import Any

import pytest
import torch
from cases import SETTINGS as CASE_SETTINGS
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

SETTINGS = CASE_SETTINGS | {
    "tokens": (0, 1, 7, 8, 9, 63, 64, 65, 300),
    "heads": ((1, 1), (2, 2), (2, 4)),
    "gate": ("mild", "mixed", "forgetting", "0", "-50", "-inf"),
}
OPTIONAL_GATE = ("linear_attention", "gated_delta_product")
PACKINGS = ((0, 0, 9, 9, 50, 65, 65), (0, 1, 2, 66), (0, 0), (0,))


def sweep() -> list[FamilyCase]:
    cases = []
    for index, rule in enumerate(NAMES):
        gates = ("none",) * (rule in OPTIONAL_GATE) + SETTINGS["gate"]
        for settings in pairwise(SETTINGS | {"gate": gates}, seed=index):
            # Normalising a single number gives ±1, and a gradient that is all cancellation.
            if settings["sizes"][0] == 1:
                settings["use_qk_l2norm"] = False
            cases.append(FamilyCase(rule, Case(**settings)))
        for cu_seqlens, dtype in itertools.product(PACKINGS, (torch.float32, torch.bfloat16)):
            case = Case(tokens=cu_seqlens[-1], gate="mixed", dtype=dtype, cu_seqlens=cu_seqlens)
            cases.append(FamilyCase(rule, case))
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("use_qk_l2norm", [False, True])
def test_recurrent_form_in_place(rule: str, dtype: torch.dtype, use_qk_l2norm: bool) -> None:
    tensors = make(FamilyCase(rule, Case(tokens=19, sizes=(20, 70), dtype=dtype, gate="mixed")))
    names = [name for name in tensors if name.startswith("initial")]
    working = {}
    for name in names:  # rows of a wider tensor, so that what lies between them must stay
        wide = torch.full((*tensors[name].shape[:-1], 90), torch.nan, dtype=tensors[name].dtype)
        working[name] = wide[..., :70].copy_(tensors[name])
    states = tuple(working.values())
    positional, _ = arguments(rule, tensors)
    recurrent = getattr(ops, rule + "_recurrent_")
    options = {"use_qk_l2norm": use_qk_l2norm}
    if rule == "momentum_delta_rule":
        o = recurrent(*positional[:7], states, positional[7], **options)
    elif rule == "gated_delta_product":
        o = recurrent(*positional[:5], *states, WRITES, **options)
    else:
        o = recurrent(*positional, *states, **options)
    exact_o, exact_states = expected(rule, tensors, use_qk_l2norm=use_qk_l2norm)
    assert_near("o", o, exact_o, OUTPUT_TOLERANCE[dtype])
    for state, exact_state in zip(states, exact_states, strict=True):
        assert_near("state", state, exact_state, OUTPUT_TOLERANCE[dtype])
        base = state._base
        assert base is not None
        assert base[..., 70:].isnan().all()


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


@pytest.mark.parametrize("rule", NAMES)
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


def blamed(rule: str) -> str:
    """The rule that errors name: rwkv7 is the generalized rule by other names."""
    return "generalized_delta_rule" if rule == "rwkv7" else rule


@pytest.mark.parametrize(("rule", "name"), [(r, n) for r in NAMES for n in NAMES[r]])
def test_errors_name_the_tensor(rule: str, name: str) -> None:
    tensors = small(rule, heads=(2, 4))
    if name not in tensors:
        tensors[name] = tensors["k"].clone()
    shown = {"r": "q", "w": "g"}.get(name, name) if rule == "rwkv7" else name
    beginning = f"^{blamed(rule)}: {shown} must (be|have)"
    if shown != "q":  # every other tensor is measured against q
        with pytest.raises(ShapeError, match=beginning) as caught:
            call(rule, tensors | {name: tensors[name][..., :-1, :]})
        came = "HV = 3" if name == "v" else str(list(tensors[name][..., :-1, :].shape))
        assert came in str(caught.value)
    with pytest.raises(ShapeError, match=beginning):
        call(rule, tensors | {name: tensors[name].to(torch.int64)})
    with pytest.raises(ShapeError, match=beginning):
        call(rule, tensors | {name: tensors[name][0, 0, 0]})


@pytest.mark.parametrize("rule", NAMES)
def test_errors_name_the_state(rule: str) -> None:
    tensors = small(rule)
    for name in [name for name in tensors if name.startswith("initial")]:
        with pytest.raises(ShapeError, match=f"^{blamed(rule)}: {name} must be"):
            call(rule, tensors | {name: tensors[name][..., 1:]})
        with pytest.raises(ShapeError, match=f"^{blamed(rule)}: {name} must be"):
            call(rule, tensors | {name: tensors[name].double()})


@pytest.mark.parametrize("writes", [0, -1, 3])
def test_writes_must_fit(writes: int) -> None:
    x = small("gated_delta_product")
    with pytest.raises(ShapeError, match=r"^gated_delta_product: .*num_householder"):
        ops.gated_delta_product(x["q"], x["k"], x["v"], x["g"], x["beta"], writes)


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
