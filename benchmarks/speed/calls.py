"""The library's rules as calls on `Inputs`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import Inputs, Rule

from fastweights import ops

RULES: dict[str, Rule] = {
    "gated_delta_rule": lambda x: ops.gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)[0],
    "delta_rule": lambda x: ops.delta_rule(x.q, x.k, x.v, x.beta)[0],
    "linear_attention": lambda x: ops.linear_attention(x.q, x.k, x.v, x.g)[0],
    "kda": lambda x: ops.kda(x.q, x.k, x.v, x.channel_g, x.beta)[0],
    "generalized_delta_rule": lambda x: ops.generalized_delta_rule(
        x.q, x.k, x.v, x.a, x.b, x.channel_g
    )[0],
    "rwkv7": lambda x: ops.rwkv7(x.q, x.channel_g, x.k, x.v, x.a, x.b)[0],
    "momentum_delta_rule": lambda x: ops.momentum_delta_rule(
        x.q, x.k, x.v, x.g, x.beta, x.mu, x.eta
    )[0],
}
INPUTS = {
    "gated_delta_rule": ("q", "k", "v", "g", "beta"),
    "delta_rule": ("q", "k", "v", "beta"),
    "linear_attention": ("q", "k", "v", "g"),
    "kda": ("q", "k", "v", "channel_g", "beta"),
    "generalized_delta_rule": ("q", "k", "v", "a", "b", "channel_g"),
    "rwkv7": ("q", "channel_g", "k", "v", "a", "b"),
    "momentum_delta_rule": ("q", "k", "v", "g", "beta", "mu", "eta"),
}


def forward(rule: str, inputs: Inputs, peer: Rule | None = None) -> Callable[[], torch.Tensor]:
    """A call of a rule, or of a peer's, without gradients."""
    function = peer or RULES[rule]

    def call() -> torch.Tensor:
        with torch.no_grad():
            return function(inputs)

    return call


def forward_and_backward(
    rule: str, inputs: Inputs, peer: Rule | None = None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The same with the gradients of every input of the rule."""
    function = peer or RULES[rule]
    leaves = inputs.requiring_gradients()
    wanted = [getattr(leaves, name) for name in INPUTS[rule]]

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(leaves).square().sum(), wanted)

    return call
