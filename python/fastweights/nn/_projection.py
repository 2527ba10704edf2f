from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_initialise = True


@contextmanager
def without_initial_values() -> Iterator[None]:
    """Projections made meanwhile have no initial values, and random numbers stay where they are.

    For weights that are about to be replaced: drawing them takes longer than reading a model. The
    meta device would do as well, but its first use imports for a second.
    """
    global _initialise
    before, _initialise = _initialise, False
    state = torch.get_rng_state()
    try:
        yield
    finally:
        _initialise = before
        torch.set_rng_state(state)


def make_projection(inputs: int, outputs: int, std: float) -> nn.Linear:
    """A Linear without a bias, weights normal(0, std)."""
    if not _initialise:
        return _empty_projection(inputs, outputs)
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, 0.0, std)
    return linear


def _empty_projection(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)  # which draws its weights when it is made
    linear.in_features, linear.out_features = inputs, outputs
    linear.weight = nn.Parameter(torch.empty(outputs, inputs))
    return linear
