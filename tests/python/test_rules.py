"""Outputs, final states and all gradients of the rules against the fp64 oracle."""

import pytest
import torch
from cases import Case, Inputs, make_inputs, sweep
from comparison import (
    GATE_GRADIENT_TOLERANCE,
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    assert_near,
)
from rules import call, call_oracle, loss_of, options_of, threads
from torch import Tensor

PACKINGS = ((0, 15), (0, 0, 15, 15, 79, 143, 143), (0, 1, 2, 66), (0, 256, 500, 1000), (0, 0), (0,))


def packed_cases() -> list[Case]:
    cases = []
    for cu_seqlens in PACKINGS:
        for gate in ("none", "mixed"):
            for dtype in (torch.float32, torch.bfloat16):
                cases.append(
                    Case(tokens=cu_seqlens[-1], gate=gate, dtype=dtype, cu_seqlens=cu_seqlens)
                )
    return cases


def gradients(inputs: Inputs, o: Tensor, state: Tensor | None) -> dict[str, Tensor]:
    named = inputs.tensors()
    values = torch.autograd.grad(loss_of(o, state), list(named.values()), materialize_grads=True)
    return dict(zip(named, values, strict=True))


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("case", sweep() + packed_cases(), ids=str)
def test_outputs_state_and_gradients(case: Case) -> None:
    inputs = make_inputs(case).with_gradients()
    exact = inputs.double().with_gradients()
    options = options_of(case)
    with threads(2):
        o, state = call(inputs, output_final_state=True, **options)
        given = gradients(inputs, o, state)
    expected_o, expected_state = call_oracle(exact, **options)
    expected = gradients(exact, expected_o, expected_state)

    assert state is not None
    assert o.dtype == case.dtype
    assert state.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert_near("o", o, expected_o, OUTPUT_TOLERANCE[case.dtype])
    assert_near("final_state", state, expected_state, OUTPUT_TOLERANCE[case.dtype])
    for name, gradient in given.items():
        tolerances = GATE_GRADIENT_TOLERANCE if name in ("g", "beta") else GRADIENT_TOLERANCE
        assert gradient.dtype == inputs.tensors()[name].dtype
        tolerance = max(tolerances[case.dtype], tolerances[gradient.dtype])
        assert_near(f"d{name}", gradient, expected[name], tolerance)


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_final_state_is_none_unless_asked_for(gate: str) -> None:
    inputs = make_inputs(Case(gate=gate))
    o, state = call(inputs)
    assert state is None
    assert torch.equal(o, call(inputs, output_final_state=True)[0])


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_no_tokens_return_a_copy_of_the_initial_state(gate: str) -> None:
    inputs = make_inputs(Case(tokens=0, gate=gate))
    o, state = call(inputs, output_final_state=True)
    assert state is not None
    assert inputs.initial_state is not None
    assert o.shape == inputs.v.shape
    assert torch.equal(state, inputs.initial_state)
    assert state.data_ptr() != inputs.initial_state.data_ptr()


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_inputs_are_not_changed(gate: str) -> None:
    inputs = make_inputs(Case(gate=gate))
    before = {name: x.clone() for name, x in inputs.tensors().items()}
    call(inputs, output_final_state=True)
    for name, x in inputs.tensors().items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("gate", ["none", "mild"])
@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0, 0.0])
def test_scale(gate: str, scale: float) -> None:
    inputs = make_inputs(Case(gate=gate, dtype=torch.float64))
    o, _ = call(inputs, scale=scale)
    assert_near("o", o, call_oracle(inputs, scale=scale)[0], 1e-11)


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_two_halves_with_the_state_between_are_the_whole(gate: str) -> None:
    inputs = make_inputs(Case(gate=gate, tokens=130, dtype=torch.float64))
    whole, last = call(inputs, output_final_state=True)

    def part(begin: int, end: int, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tensors = {name: x[:, begin:end] for name, x in inputs.tensors().items()}
        return call(Inputs.of(tensors | {"initial_state": state}), output_final_state=True)

    first, state = part(0, 70, inputs.initial_state)
    second, state = part(70, 130, state)
    assert state is not None
    assert last is not None
    assert_near("o", torch.cat([first, second], 1), whole, 1e-12)
    assert_near("final_state", state, last, 1e-12)


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_unused_outputs_have_no_gradient(gate: str) -> None:
    inputs = make_inputs(Case(gate=gate, dtype=torch.float64)).with_gradients()
    exact = inputs.with_gradients()
    _, state = call(inputs, output_final_state=True)
    _, expected_state = call_oracle(exact)
    assert state is not None
    state.square().sum().backward()
    expected_state.square().sum().backward()
    for name, x in inputs.tensors().items():
        expected = exact.tensors()[name].grad
        assert x.grad is not None
        if name == "q":
            assert not x.grad.any()
        else:
            assert expected is not None
            assert_near(f"d{name}", x.grad, expected, 1e-10)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    inputs = make_inputs(Case(tokens=200)).with_gradients()
    results = []
    for count in (1, 2):
        with threads(count):
            o, state = call(inputs, output_final_state=True)
            results.append([o, state, *gradients(inputs, o, state).values()])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
