"""The rules among PyTorch's own tools: gradcheck, opcheck, compile, autocast, torch.func."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Inputs, make_inputs
from comparison import assert_near
from rules import call, loss_of
from torch import Tensor

from fastweights import ops

RULES = ["none", "mild"]  # the gate: without and with one


def small(gate: str, **settings: Any) -> Inputs:
    defaults: dict[str, Any] = {"tokens": 5, "sizes": (3, 4), "dtype": torch.float64}
    return make_inputs(Case(gate=gate, **defaults | settings))


def rebuilt(inputs: Inputs, tensors: tuple[Tensor, ...]) -> Inputs:
    return Inputs.of(dict(zip(inputs.tensors(), tensors, strict=True)))


def function_of(inputs: Inputs, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rule as a function of the tensors of `inputs`, in their order."""

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        o, state = call(rebuilt(inputs, tensors), output_final_state=True, **options)
        assert state is not None
        return o, state

    return function


@pytest.mark.parametrize("gate", RULES)
@pytest.mark.parametrize("use_qk_l2norm", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, (0, 2, 2, 5)], ids=str)
def test_gradcheck(gate: str, use_qk_l2norm: bool, cu_seqlens: tuple[int, ...] | None) -> None:
    inputs = small(gate, sizes=(2, 3), heads=(1, 2), cu_seqlens=cu_seqlens).with_gradients()
    packing = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    function = function_of(inputs, use_qk_l2norm=use_qk_l2norm, cu_seqlens=packing)
    assert torch.autograd.gradcheck(function, tuple(inputs.tensors().values()))


def arguments_of(inputs: Inputs) -> tuple[Tensor, ...]:
    gates = () if inputs.g is None else (inputs.g,)
    return (inputs.q, inputs.k, inputs.v, *gates, inputs.beta)


def operator_of(gate: str, suffix: str = "") -> Any:
    name = ("delta_rule" if gate == "none" else "gated_delta_rule") + suffix
    return getattr(torch.ops.fastweights, name).default


@pytest.mark.parametrize("gate", RULES)
@pytest.mark.parametrize("cu_seqlens", [None, (0, 2, 2, 5)], ids=str)
def test_opcheck(gate: str, cu_seqlens: tuple[int, ...] | None) -> None:
    inputs = small(gate, dtype=torch.float32, cu_seqlens=cu_seqlens).with_gradients()
    packing = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    options = {"initial_state": inputs.initial_state, "output_final_state": True}
    torch.library.opcheck(
        operator_of(gate), arguments_of(inputs), options | {"cu_seqlens": packing}
    )
    if cu_seqlens is None:
        torch.library.opcheck(operator_of(gate), arguments_of(inputs))


@pytest.mark.parametrize("gate", RULES)
def test_opcheck_of_the_recurrent_form(gate: str) -> None:
    inputs = small(gate, dtype=torch.float32)
    torch.library.opcheck(
        operator_of(gate, "_recurrent_"), (*arguments_of(inputs), inputs.initial_state)
    )


@pytest.mark.parametrize(
    ("gate", "dynamic", "backend"),
    [("mild", False, "inductor"), ("none", True, "aot_eager"), ("mild", True, "aot_eager")],
)
def test_compile_in_one_graph(gate: str, dynamic: bool, backend: str) -> None:
    torch.compiler.reset()

    def function(inputs: Inputs) -> tuple[Tensor, Tensor]:
        o, state = call(inputs, output_final_state=True, use_qk_l2norm=True)
        assert state is not None
        return o.sin(), state.cos()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (7, 66):
        inputs = small(gate, tokens=tokens).with_gradients()
        twins = inputs.with_gradients()
        loss_of(*function(inputs)).backward()
        loss_of(*compiled(twins)).backward()
        for name, x in inputs.tensors().items():
            given = twins.tensors()[name].grad
            assert given is not None
            assert x.grad is not None
            assert_near(f"d{name}", given, x.grad, 1e-12)


@pytest.mark.parametrize("gate", RULES)
def test_compile_of_the_recurrent_form(gate: str) -> None:
    torch.compiler.reset()
    inputs = small(gate, tokens=1)
    assert inputs.initial_state is not None

    def step(inputs: Inputs, state: Tensor) -> Tensor:
        q, k, v, g, beta = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta
        if g is None:
            return ops.delta_rule_recurrent_(q, k, v, beta, state) + 1
        return ops.gated_delta_rule_recurrent_(q, k, v, g, beta, state) + 1

    state, twin = inputs.initial_state.clone(), inputs.initial_state.clone()
    expected = step(inputs, state)
    assert_near("o", torch.compile(step, fullgraph=True)(inputs, twin), expected, 1e-14)
    assert_near("state", twin, state, 1e-14)


@pytest.mark.parametrize("gate", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_computes_in_the_autocast_type(gate: str, dtype: torch.dtype) -> None:
    inputs = small(gate, dtype=dtype, tokens=70, sizes=(16, 16))
    leaves = inputs.with_gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = call(leaves, output_final_state=True)
    assert state is not None
    loss_of(o, state).backward()
    expected, _ = call(inputs.double(), output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert_near("o", o, expected, 1e-2)
    for x in leaves.tensors().values():
        assert x.grad is not None
        assert x.grad.dtype == x.dtype


@pytest.mark.parametrize("gate", RULES)
def test_functional_gradients(gate: str) -> None:
    inputs = small(gate)
    function = function_of(inputs)
    tensors = tuple(inputs.tensors().values())
    every = tuple(range(len(tensors)))
    given = torch.func.grad(lambda *x: loss_of(*function(*x)), every)(*tensors)
    leaves = inputs.with_gradients()
    loss_of(*function(*leaves.tensors().values())).backward()
    for (name, x), gradient in zip(leaves.tensors().items(), given, strict=True):
        assert x.grad is not None
        assert_near(f"d{name}", gradient, x.grad, 1e-13)


@pytest.mark.parametrize("gate", RULES)
@pytest.mark.parametrize("dims", [0, 1, -1])
def test_vmap_over_any_axis(gate: str, dims: int) -> None:
    inputs = small(gate)
    function = function_of(inputs, use_qk_l2norm=True)
    rows = [tuple(small(gate).tensors().values()) for _ in range(3)]
    rows = [tuple(x * (1 + 0.1 * n) for x in row) for n, row in enumerate(rows)]
    stacked = [torch.stack(x, dims) for x in zip(*rows, strict=True)]
    given = torch.vmap(function, in_dims=dims)(*stacked)
    expected = [torch.stack(x) for x in zip(*(function(*row) for row in rows), strict=True)]
    assert_near("o", given[0], expected[0], 1e-13)
    assert_near("state", given[1], expected[1], 1e-13)


@pytest.mark.parametrize("gate", RULES)
def test_vmap_over_one_argument(gate: str) -> None:
    inputs = small(gate)
    scaled = torch.stack([inputs.v, 2 * inputs.v])

    def function(v: Tensor) -> Tensor:
        return call(replace(inputs, v=v))[0]

    given = torch.vmap(function)(scaled)
    assert_near("o", given, torch.stack([function(v) for v in scaled]), 1e-13)


@pytest.mark.parametrize("gate", RULES)
def test_gradients_per_sample(gate: str) -> None:
    inputs = small(gate)
    function = function_of(inputs)
    tensors = tuple(inputs.tensors().values())
    every = tuple(range(len(tensors)))
    gradient = torch.func.grad(lambda *x: sum(y.square().sum() for y in function(*x)), every)
    samples = tuple(torch.stack([x, 0.5 * x]) for x in tensors)
    given = torch.vmap(gradient)(*samples)
    expected = [
        torch.stack(x)
        for x in zip(*(gradient(*(x[n] for x in samples)) for n in range(2)), strict=True)
    ]
    for name, mine, theirs in zip(inputs.tensors(), given, expected, strict=True):
        assert_near(f"d{name}", mine, theirs, 1e-12)


@pytest.mark.parametrize("gate", RULES)
def test_gradients_through_vmap(gate: str) -> None:
    inputs = small(gate)
    function = function_of(inputs)
    samples = [torch.stack([x, 0.5 * x]) for x in inputs.tensors().values()]
    leaves = [x.clone().requires_grad_() for x in samples]
    twins = [x.clone().requires_grad_() for x in samples]
    loss_of(*torch.vmap(function)(*leaves)).backward()
    rows = [function(*(x[n] for x in twins)) for n in range(2)]
    o, state = (torch.stack(x) for x in zip(*rows, strict=True))
    loss_of(o, state).backward()
    for name, mine, theirs in zip(inputs.tensors(), leaves, twins, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_near(f"d{name}", mine.grad, theirs.grad, 1e-12)


@pytest.mark.parametrize("gate", RULES)
def test_vmap_over_packed_input_says_why_it_cannot(gate: str) -> None:
    inputs = small(gate, cu_seqlens=(0, 2, 5))
    function = function_of(inputs, cu_seqlens=torch.tensor((0, 2, 5)))
    with pytest.raises(NotImplementedError, match="cu_seqlens"):
        torch.vmap(function)(*(x[None] for x in inputs.tensors().values()))


@pytest.mark.parametrize("gate", RULES)
def test_second_derivatives_are_refused(gate: str) -> None:
    inputs = small(gate).with_gradients()
    o, _ = call(inputs)
    (first,) = torch.autograd.grad(o.square().sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="delta_rule"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("gate", RULES)
def test_forward_mode_is_refused(gate: str) -> None:
    inputs = small(gate)
    function = function_of(inputs)
    tensors = tuple(inputs.tensors().values())
    with pytest.raises(NotImplementedError, match=r"delta_rule.*forward"):
        torch.func.jvp(function, tensors, tuple(map(torch.ones_like, tensors)))


def test_no_graph_without_gradients() -> None:
    inputs = small("mild").with_gradients()
    with torch.no_grad():
        o, state = call(inputs, output_final_state=True)
    assert not o.requires_grad
    assert state is not None
    assert not state.requires_grad


def test_tensor_subclasses_are_asked() -> None:
    seen = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    inputs = small("none")
    ops.delta_rule(inputs.q.as_subclass(Watched), inputs.k, inputs.v, inputs.beta)
    assert "fastweights.delta_rule" in seen
