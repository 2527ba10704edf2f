"""Inputs of the rules, and a sweep in which every pair of settings occurs."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

SETTINGS: dict[str, Sequence[Any]] = {
    "tokens": (0, 1, 63, 64, 65, 1000),
    "sizes": ((64, 64), (60, 100), (100, 60), (256, 1), (1, 256), (128, 32)),  # K, V
    "heads": ((1, 1), (2, 2), (2, 4), (1, 3)),  # H, HV
    "gate": ("none", "mild", "mixed", "forgetting", "0", "-1e-6", "-50", "-inf"),
    "beta": ("unit", "two", "mixed"),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "gates_in_fp32": (False, True),
    "initial_state": (False, True),
    "use_qk_l2norm": (False, True),
    "contiguous": (True, False),
}


@dataclass(frozen=True)
class Case:
    """One call of a rule; the rule without a gate if `gate` is "none"."""

    tokens: int = 65
    sizes: tuple[int, int] = (16, 24)
    heads: tuple[int, int] = (2, 4)
    gate: str = "mild"
    beta: str = "unit"
    dtype: torch.dtype = torch.float32
    gates_in_fp32: bool = False
    initial_state: bool = True
    use_qk_l2norm: bool = False
    contiguous: bool = True
    cu_seqlens: tuple[int, ...] | None = None

    def __str__(self) -> str:
        names = (str(getattr(self, field.name)) for field in fields(self))
        return "-".join(names).replace("torch.", "").replace(" ", "")


@dataclass(frozen=True)
class Inputs:
    """Tensors of a call; `g` and `initial_state` may be absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor
    initial_state: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Inputs":
        """The inverse of `tensors`."""
        return cls(**{"g": None, "initial_state": None} | dict(tensors))  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Any]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_gradients(self) -> "Inputs":
        """The same values as leaves that require gradients, layouts kept."""
        return replace(
            self,
            **{name: x.detach().requires_grad_() for name, x in self.tensors().items()},
        )

    def double(self) -> "Inputs":
        return replace(self, **{name: x.detach().double() for name, x in self.tensors().items()})


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = 1 if case.cu_seqlens or case.tokens >= 1000 else 2
    states = len(case.cu_seqlens) - 1 if case.cu_seqlens else rows
    (heads, value_heads), (key_size, value_size) = case.heads, case.sizes
    k = normal(rows, case.tokens, heads, key_size)
    if not case.use_qk_l2norm:  # shorter than 1, lest a write with β = 1 leave exactly nothing
        k = 0.9 * torch.nn.functional.normalize(k, dim=-1)
    gates = (rows, case.tokens, value_heads)
    gate_dtype = torch.float32 if case.gates_in_fp32 else case.dtype
    state_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    state = normal(states, value_heads, key_size, value_size).to(state_dtype)
    g = _gate(case.gate, torch.rand(gates, generator=generator))
    inputs = Inputs(
        q=normal(rows, case.tokens, heads, key_size).to(case.dtype),
        k=k.to(case.dtype),
        v=normal(rows, case.tokens, value_heads, value_size).to(case.dtype),
        g=None if g is None else g.to(gate_dtype),
        beta=_beta(case.beta, torch.rand(gates, generator=generator)).to(gate_dtype),
        initial_state=state if case.initial_state else None,
    )
    if case.contiguous:
        return inputs
    return replace(inputs, **{name: strided(x) for name, x in inputs.tensors().items()})


def pairwise(settings: dict[str, Sequence[Any]], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Few combinations in which every pair of values of two settings occurs, found greedily."""
    names = list(settings)
    rng = random.Random(seed)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(settings[a]))
        for j in range(len(settings[b]))
    }

    def pairs(choice: dict[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
        return set(itertools.combinations(choice.items(), 2))

    while missing:
        first, second = min(missing)
        candidates = (
            {name: rng.randrange(len(settings[name])) for name in names} | dict((first, second))
            for _ in range(50)
        )
        best = max(candidates, key=lambda choice: len(pairs(choice) & missing))
        missing -= pairs(best)
        yield {name: settings[name][index] for name, index in best.items()}


def sweep() -> list[Case]:
    cases = [Case(**settings) for settings in pairwise(SETTINGS)]
    # Normalising a single number gives ±1, and a gradient that is all cancellation.
    return [replace(case, use_qk_l2norm=case.use_qk_l2norm and case.sizes[0] > 1) for case in cases]


def _gate(kind: str, uniform: Tensor) -> Tensor | None:
    """Log-decays from numbers in [0, 1)."""
    if kind == "none":
        return None
    if kind == "mild":
        return -uniform
    if kind == "forgetting":
        return torch.where(uniform < 0.1, -torch.inf, -uniform)
    if kind != "mixed":
        return torch.full_like(uniform, float(kind))
    choices = torch.tensor([0.0, -1e-6, -50.0, -torch.inf, -0.1])
    return choices[(uniform * len(choices)).long()]


def _beta(kind: str, uniform: Tensor) -> Tensor:
    if kind == "unit":
        return uniform
    if kind == "two":
        return 2.0 * uniform
    choices = torch.tensor([0.0, 1.0, 2.0, 0.5])
    return choices[(uniform * len(choices)).long()]


def strided(x: Tensor) -> Tensor:
    """The same values with other strides: every second element of a longer last axis, and the
    first two axes swapped in memory."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide = wide.transpose(0, 1).contiguous().transpose(0, 1)
    view = wide[..., ::2]
    view.copy_(x)
    return view
