"""Calls a rule or its oracle with the tensors of a case."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import torch
from cases import Case, Inputs
from torch import Tensor

from fastweights import ops


def call(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The rule that fits the inputs: the one without a gate if there is no g."""
    options.setdefault("initial_state", inputs.initial_state)
    if inputs.g is None:
        return ops.delta_rule(inputs.q, inputs.k, inputs.v, inputs.beta, **options)
    return ops.gated_delta_rule(inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, **options)


def call_oracle(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    return oracle.delta_rule(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.beta,
        g=inputs.g,
        initial_state=inputs.initial_state,
        **options,
    )


def options_of(case: Case) -> dict[str, Any]:
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)
    return {"cu_seqlens": cu_seqlens, "use_qk_l2norm": case.use_qk_l2norm}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs what is within on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loss_of(o: Tensor, state: Tensor | None, seed: int = 1) -> Tensor:
    """A scalar that depends on every element; the same weights for every type."""
    generator = torch.Generator().manual_seed(seed)
    assert state is not None
    weights = torch.randn(o.shape, generator=generator).to(torch.bfloat16)
    state_weights = torch.randn(state.shape, generator=generator).to(torch.bfloat16)
    return (o * weights.to(o.dtype)).sum().double() + (state * state_weights.to(state.dtype)).sum()
