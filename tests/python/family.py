"""The rules beside the two delta rules: their inputs, and what they are, token by token in fp64."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case, make_inputs, strided
from oracle import l2_normalised
from torch import Tensor
from torch.nn.functional import normalize

from fastweights import ops

Tensors = dict[str, Tensor]
WRITES = 2  # of gated_delta_product

NAMES = {
    "linear_attention": ("q", "k", "v", "g"),
    "kda": ("q", "k", "v", "g", "beta"),
    "gated_delta_product": ("q", "k", "v", "g", "beta"),
    "generalized_delta_rule": ("q", "k", "v", "a", "b", "g"),
    "rwkv7": ("r", "w", "k", "v", "a", "b"),
    "momentum_delta_rule": ("q", "k", "v", "g", "beta", "mu", "eta", "p"),
}
OPERATORS = ("linear_attention", "kda", "generalized_delta_rule", "momentum_delta_rule")
CHANNEL_GATES = ("kda", "generalized_delta_rule", "rwkv7")
KEYS = ("q", "k", "r", "a", "b", "p")
GATES = ("g", "w", "beta", "mu", "eta")


@dataclass(frozen=True)
class FamilyCase:
    """A rule and the inputs of a call; `gate` "none" only where the rule can do without."""

    rule: str
    case: Case

    def __str__(self) -> str:
        return f"{self.rule}-{self.case}"


def make(family: FamilyCase) -> Tensors:
    """The call's tensors by name, states among them; layouts as the case has them."""
    rule, case = family.rule, family.case
    base = make_inputs(case)
    generator = torch.Generator().manual_seed(1)
    rows, tokens, heads, keys = base.q.shape
    value_heads = base.v.shape[2]
    gates = (rows, tokens, value_heads)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x: Tensors = {"q": base.q, "k": base.k, "v": base.v, "beta": base.beta}
    if base.g is not None:
        x["g"] = base.g
    if rule in CHANNEL_GATES:
        gate = uniform(*gates, keys)
        mixed = torch.where(gate < 0.2, -torch.inf, -(gate**4))
        draws = {"mild": -gate, "mixed": mixed}
        draws["forgetting"] = torch.where(gate < 0.1, -torch.inf, -gate)
        chosen = draws.get(case.gate)
        x["g"] = (0 * gate + float(case.gate) if chosen is None else chosen).to(base.beta.dtype)
    if rule in ("generalized_delta_rule", "rwkv7"):
        # RWKV-7's a and b, and something across: neither is a multiple of the other.
        direction = normalize(normal(rows, tokens, heads, keys), dim=-1)
        across = normalize(normal(2, rows, tokens, heads, keys), dim=-1)
        strength = uniform(rows, tokens, heads, keys)
        x["a"] = (-0.8 * direction + 0.1 * across[0]).to(case.dtype)
        x["b"] = (0.8 * direction * strength + 0.1 * across[1]).to(case.dtype)
    if rule == "momentum_delta_rule":
        if "g" not in x:
            x["g"] = torch.zeros_like(x["beta"])
        x["beta"] = uniform(*gates).to(base.beta.dtype)
        x["mu"] = (0.8 * uniform(*gates)).to(base.beta.dtype)
        x["eta"] = uniform(*gates).to(base.beta.dtype)
        if case.tokens != 65:
            x["p"] = (0.9 * normalize(normal(rows, tokens, heads, keys), dim=-1)).to(case.dtype)
    if rule == "gated_delta_product":
        for name in ("k", "v", "beta"):
            x[name] = torch.cat([x[name], x[name].flip(1)], 1)
    if rule == "rwkv7":
        x["r"], x["w"] = x.pop("q"), x.pop("g")
    x = {name: x[name] for name in NAMES[rule] if name in x}
    if not case.contiguous:
        x = {name: strided(tensor) for name, tensor in x.items()}
    if base.initial_state is not None:
        x["initial_state"] = base.initial_state
        if rule == "momentum_delta_rule":
            x["initial_momentum"] = 0.5 * base.initial_state.flip(2)
    return x


def arguments(rule: str, tensors: Tensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and options of a call of `rule`."""
    positional: list[Any] = [tensors.get(name) for name in NAMES[rule]]
    if rule == "gated_delta_product":
        positional.append(WRITES)
    state: Any = tensors.get("initial_state")
    if rule == "momentum_delta_rule" and state is not None:
        state = (state, tensors["initial_momentum"])
    return tuple(positional), {"initial_state": state}


def call(rule: str, tensors: Tensors, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o and the final states (a tuple of one, or of two)."""
    positional, given = arguments(rule, tensors)
    function: Callable[..., Any] = getattr(ops, rule)
    o, state = function(*positional, **given, output_final_state=True, **options)
    return o, state if isinstance(state, tuple) else (state,)


def expected(
    rule: str, tensors: Tensors, cu_seqlens: Tensor | None = None, use_qk_l2norm: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The oracle, in fp64; differentiable."""
    x = {name: tensor.double() for name, tensor in tensors.items()}
    if rule == "rwkv7":
        x["q"], x["g"] = x.pop("r"), x.pop("w")
    if use_qk_l2norm:
        x["q"], x["k"] = l2_normalised(x["q"]), l2_normalised(x["k"])
    if rule != "rwkv7":
        x["q"] = x["q"] * x["q"].shape[-1] ** -0.5
    groups = x["v"].shape[2] // x["q"].shape[2]
    for name in set(KEYS) & x.keys():
        x[name] = x[name].repeat_interleave(groups, dim=2)
    if cu_seqlens is None:
        return _walk(rule, x)
    writes = WRITES if rule == "gated_delta_product" else 1
    outputs = [x["v"][:, :0]]
    states = []
    for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        part = {}
        for name, tensor in x.items():
            if name.startswith("initial"):
                part[name] = tensor[n : n + 1]
            else:
                steps = writes if name in ("k", "v", "beta") else 1
                part[name] = tensor[:, begin * steps : end * steps]
        o, last = _walk(rule, part)
        outputs.append(o)
        states.append(last)
    count = 2 if rule == "momentum_delta_rule" else 1
    shape = (0, x["v"].shape[2], x["q"].shape[3], x["v"].shape[3])
    empty = x["v"].new_zeros(shape)
    joined = (torch.cat([empty, *(state[i] for state in states)]) for i in range(count))
    return torch.cat(outputs, 1), tuple(joined)


def _walk(rule: str, x: Tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
    q, v = x["q"], x["v"]
    zeros = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    state = x.get("initial_state", zeros)
    momentum = x.get("initial_momentum", zeros)
    outputs = [v[:, :0]]
    for t in range(q.shape[1]):

        def row(name: str, index: int = t) -> Tensor:
            return x[name][:, index, :, :, None]  # [B, HV, K, 1]

        def gate(name: str, index: int = t) -> Tensor:
            return x[name][:, index, :, None, None]

        decay = torch.ones_like(zeros[:, :, :1, :1])
        if "g" in x:
            decay = (row("g") if rule in CHANNEL_GATES else gate("g")).exp()
        if rule == "linear_attention":
            state = decay * state + row("k") @ row("v").mT
        elif rule in ("generalized_delta_rule", "rwkv7"):
            read = state.mT @ row("a")
            state = decay * state + row("b") @ read.mT + row("k") @ row("v").mT
        elif rule == "momentum_delta_rule":
            error = row("v") - state.mT @ row("p" if "p" in x else "k")
            momentum = gate("mu") * momentum + gate("eta") * row("k") @ error.mT
            state = decay * state + gate("beta") * momentum
        else:
            writes = WRITES if rule == "gated_delta_product" else 1
            state = decay * state
            for i in range(t * writes, (t + 1) * writes):
                error = row("v", i) - state.mT @ row("k", i)
                state = state + gate("beta", i) * row("k", i) @ error.mT
        outputs.append((state.mT @ row("q"))[..., 0][:, None])
    states = (state, momentum) if rule == "momentum_delta_rule" else (state,)
    return torch.cat(outputs, 1), states
