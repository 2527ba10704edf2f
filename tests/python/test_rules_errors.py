"""Wrong calls raise ShapeError with a message that names tensor, expected and given."""

from typing import Any

import pytest
import torch
from cases import Case, make_inputs

import fastweights
from fastweights import ops

CASES: list[tuple[str, Any, str]] = [
    ("q", torch.zeros(2, 5, 2), r"q must be \[B, T, H, K\], got \[2, 5, 2\]"),
    ("q", torch.zeros(2, 5, 2, 3, dtype=torch.int64), "q must be .*BFloat16.* got Long"),
    ("k", torch.zeros(2, 5, 2, 4), r"k must be .* = \[2, 5, 2, 3\], got \[2, 5, 2, 4\]"),
    ("k", torch.zeros(2, 5, 2, 3, dtype=torch.float64), "k must be Float, got Double"),
    ("v", torch.zeros(2, 6, 4, 4), r"v must be .* got \[2, 6, 4, 4\]"),
    (
        "v",
        torch.zeros(2, 5, 3, 4),
        "v must have a positive multiple of q's heads, H = 2, got HV = 3",
    ),
    ("v", torch.zeros(2, 5, 4, 257), "V must be from 1 to 256, got 257"),
    ("v", torch.zeros(2, 5, 4, 0), "V must be from 1 to 256, got 0"),
    ("g", torch.zeros(2, 5, 3), r"g must be \[B, T, HV\] = \[2, 5, 4\], got \[2, 5, 3\]"),
    ("g", torch.zeros(2, 5, 4, dtype=torch.float16), "g must be Float, got Half"),
    ("beta", torch.zeros(2, 5), r"beta must be \[B, T, HV\] = \[2, 5, 4\], got \[2, 5\]"),
    ("beta", torch.zeros(2, 5, 4, device="meta"), "beta must be on cpu like q, got meta"),
    ("initial_state", torch.zeros(2, 4, 3, 5), r"initial_state must be .* = \[2, 4, 3, 4\]"),
    (
        "initial_state",
        torch.zeros(2, 4, 3, 4, dtype=torch.float16),
        "initial_state must be Float or BFloat16, got Half",
    ),
    ("cu_seqlens", torch.tensor([0, 5]), r"cu_seqlens needs packed input with B = 1, got q"),
    ("cu_seqlens", torch.tensor([0, 5], dtype=torch.int32), "cu_seqlens must be Long, got Int"),
    ("cu_seqlens", torch.tensor(5), r"cu_seqlens must be \[N \+ 1\], got \[\]"),
]


def arguments(gated: bool) -> dict[str, Any]:
    case = Case(tokens=5, sizes=(3, 4), gate="mild" if gated else "none")
    return make_inputs(case).tensors()


@pytest.mark.parametrize(("name", "value", "message"), CASES)
def test_message(name: str, value: Any, message: str) -> None:
    with pytest.raises(fastweights.ShapeError, match="^gated_delta_rule: " + message):
        ops.gated_delta_rule(**arguments(True) | {name: value})
    if name != "g":
        with pytest.raises(fastweights.ShapeError, match="^delta_rule: " + message):
            ops.delta_rule(**arguments(False) | {name: value})


PACKINGS = [
    ([1, 5], "must begin with 0 and end with T = 5, got 1 and 5"),
    ([0, 4], "must begin with 0 and end with T = 5, got 0 and 4"),
    ([0, 3, 2, 5], "must not decrease, got 3 before 2"),
    ([0, -1, 5], "must not decrease, got 0 before -1"),
]


@pytest.mark.parametrize(("cu_seqlens", "message"), PACKINGS)
def test_cu_seqlens_on_the_cpu_are_checked(cu_seqlens: list[int], message: str) -> None:
    tensors = {name: x[:1] for name, x in arguments(True).items() if name != "initial_state"}
    with pytest.raises(fastweights.ShapeError, match=f"gated_delta_rule: cu_seqlens {message}"):
        ops.gated_delta_rule(**tensors, cu_seqlens=torch.tensor(cu_seqlens))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_must_be_finite(scale: float) -> None:
    with pytest.raises(fastweights.ShapeError, match="scale must be finite"):
        ops.delta_rule(**arguments(False), scale=scale)


def test_state_of_the_recurrent_form() -> None:
    tensors = arguments(True)
    del tensors["initial_state"]
    with pytest.raises(fastweights.ShapeError, match=r"state must be .* = \[2, 4, 3, 4\]"):
        ops.gated_delta_rule_recurrent_(**tensors, state=torch.zeros(2, 4, 4, 3))
    with pytest.raises(fastweights.ShapeError, match="state must be Float or BFloat16, got Double"):
        ops.gated_delta_rule_recurrent_(
            **tensors, state=torch.zeros(2, 4, 3, 4, dtype=torch.float64)
        )


def test_an_argument_that_is_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="q"):
        ops.delta_rule(**arguments(False) | {"q": "text"})


def test_errors_are_raised_under_vmap_too() -> None:
    tensors = {name: x[None] for name, x in arguments(False).items()}
    tensors["beta"] = tensors["beta"][..., :3]
    with pytest.raises(fastweights.ShapeError, match="beta must be"):
        torch.vmap(lambda q, k, v, beta: ops.delta_rule(q, k, v, beta)[0])(
            tensors["q"], tensors["k"], tensors["v"], tensors["beta"]
        )


def test_a_compiler_reports_the_same_message() -> None:
    tensors = arguments(False) | {"beta": torch.zeros(2, 5, 3)}
    with pytest.raises(Exception, match="beta must be"):
        torch.compile(ops.delta_rule, backend="eager", fullgraph=True)(**tensors)
