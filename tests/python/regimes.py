"""Calls of every rule with ordinary and with extreme numbers, and what they should give: for
test_numerics.py and benchmarks/numerics/accuracy.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import family
import oracle
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastweights import ops

Tensors = dict[str, Tensor]
Results = dict[str, Tensor]

NAMES = {
    "delta_rule": ("q", "k", "v", "beta"),
    "gated_delta_rule": ("q", "k", "v", "g", "beta"),
} | family.NAMES
RULES = tuple(NAMES)
GATES = family.GATES
STATES = ("state", "momentum")
INFINITY = float("inf")


@dataclass(frozen=True)
class Sizes:
    """B, T, H, HV, K, V of a call."""

    batch: int = 1
    tokens: int = 64
    heads: int = 1
    value_heads: int = 2
    key_size: int = 16
    value_size: int = 16


@dataclass(frozen=True)
class Regime:
    """What is extreme about a call; `change` turns ordinary tensors, fp32, into its own."""

    name: str
    meaning: str
    change: Callable[[Tensors, torch.dtype], Tensors] = lambda x, _: x
    needs: str = "k"  # a tensor that the rule must have
    use_qk_l2norm: bool = False
    spares: tuple[str, ...] = ()  # rules for which it is outside what they are made for

    def __str__(self) -> str:
        return self.name.replace(" ", "_")

    def fits(self, rule: str) -> bool:
        return self.needs in _common_names(rule) and rule not in self.spares


def _common_names(rule: str) -> tuple[str, ...]:
    """The names of a rule's tensors; RWKV-7's q and g go by r and w."""
    return tuple({"r": "q", "w": "g"}.get(name, name) for name in NAMES[rule])


def _gate(value: float) -> Callable[[Tensors, torch.dtype], Tensors]:
    return lambda x, _: x | {"g": torch.full_like(x["g"], value)}


def _mixed_gates(x: Tensors, _: torch.dtype) -> Tensors:
    choices = torch.tensor([0.0, -1e-6, -50.0, -INFINITY, -0.1])
    generator = torch.Generator().manual_seed(3)
    return x | {"g": choices[torch.randint(5, x["g"].shape, generator=generator)]}


def _beta(value: float) -> Callable[[Tensors, torch.dtype], Tensors]:
    def change(x: Tensors, _: torch.dtype) -> Tensors:
        changed = x | {"beta": torch.full_like(x["beta"], value)}
        if "g" in x:  # no decay, which would take the state below every number
            changed["g"] = torch.zeros_like(x["g"])
        return changed

    return change


def _zero_keys(x: Tensors, _: torch.dtype) -> Tensors:
    """Every second key is nothing, and so is what belongs to it."""
    mask = torch.arange(x["k"].shape[1]) % 2 == 0
    keys = {name: x[name] for name in ("k", "a", "b", "p") if name in x}
    rows = {name: tensor.shape[1] for name, tensor in keys.items()}
    return x | {name: keys[name] * mask[: rows[name], None, None] for name in keys}


def _zero_queries_too(x: Tensors, dtype: torch.dtype) -> Tensors:
    x = _zero_keys(x, dtype)
    return x | {"q": x["q"] * (torch.arange(x["q"].shape[1]) % 4 == 0)[:, None, None]}


def _scaled(names: tuple[str, ...], factors: dict[torch.dtype, float]) -> Any:
    """Multiplies tensors by a factor of the type; fp64 takes that of fp32."""

    def change(x: Tensors, dtype: torch.dtype) -> Tensors:
        factor = factors.get(dtype, factors[torch.float32])
        return x | {name: x[name] * factor for name in names if name in x}

    return change


VALUES = ("v", "initial_state", "initial_momentum")
# Below these numbers a type has no normal ones: 2⁻¹²⁶, and 2⁻¹⁴ in fp16.
DENORMAL = {torch.float32: 2.0**-130, torch.bfloat16: 2.0**-130, torch.float16: 2.0**-17}
TINY = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 1e-2}
HUGE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 1e2}
LONG = {torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 1e3}

REGIMES = (
    Regime("ordinary", "unit keys, β in [0, 1], decays of half-lives from 0.7 to 700 tokens"),
    Regime("gate 0", "every g is 0: nothing is ever forgotten", _gate(0.0), "g"),
    Regime("gate -1e-6", "every g is −10⁻⁶", _gate(-1e-6), "g"),
    Regime("gate -50", "every g is −50: a decay of 2·10⁻²²", _gate(-50.0), "g"),
    Regime("gate -inf", "every g is −∞: each token forgets all before it", _gate(-INFINITY), "g"),
    Regime("gates mixed", "each g is one of 0, −10⁻⁶, −0.1, −50, −∞", _mixed_gates, "g"),
    Regime("beta 0", "β = 0, no decay: nothing is written", _beta(0.0), "beta"),
    Regime(
        "beta 2",
        "β = 2, unit keys, no decay: every write is a reflection, nothing is damped",
        _beta(2.0),
        "beta",
        spares=("momentum_delta_rule",),
    ),
    Regime("zero keys", "every second key has norm 0", _zero_keys),
    Regime(
        "zero keys, l2norm",
        "the same, and three of four queries, under `use_qk_l2norm`",
        _zero_queries_too,
        use_qk_l2norm=True,
    ),
    Regime(
        "long keys, l2norm",
        "keys and queries of length 10¹⁵ (fp16: 10³) under `use_qk_l2norm`",
        _scaled(("q", "k"), LONG),
        use_qk_l2norm=True,
    ),
    Regime("tiny values", "v and states times 10⁻³⁰ (fp16: 10⁻²)", _scaled(VALUES, TINY)),
    Regime("huge values", "v and states times 10³⁰ (fp16: 10²)", _scaled(VALUES, HUGE)),
    Regime(
        "denormal values",
        "v and states times 2⁻¹³⁰ (fp16: 2⁻¹⁷), below the type's normal numbers",
        _scaled(VALUES, DENORMAL),
    ),
    Regime(
        "denormal keys",
        "k times 2⁻¹³⁰ (fp16: 2⁻¹⁷), no initial state",
        lambda x, dtype: {
            name: tensor
            for name, tensor in _scaled(("k",), DENORMAL)(x, dtype).items()
            if not name.startswith("initial")
        },
    ),
)


def calls() -> Iterator[tuple[str, Regime]]:
    """Every rule in every regime that it has."""
    for rule in RULES:
        yield from ((rule, regime) for regime in REGIMES if regime.fits(rule))


def make(
    rule: str,
    regime: Regime,
    dtype: torch.dtype,
    sizes: Sizes,
    seed: int = 0,
    reading_key: bool = True,
) -> Tensors:
    """The tensors of one call by the rule's names. Those of 16 bits are rounded to them here, so
    that a reference that widens them reads the same numbers. `reading_key`: whether the momentum
    rule gets a p of its own."""
    ordinary = _ordinary(rule, sizes, torch.Generator().manual_seed(seed))
    if not reading_key:
        ordinary.pop("p", None)
    x = regime.change(ordinary, dtype)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x = {
        name: tensor.to(state_dtype if name.startswith("initial") else dtype)
        for name, tensor in x.items()
    }
    if rule == "rwkv7":
        x["r"], x["w"] = x.pop("q"), x.pop("g")
    return x


def _ordinary(rule: str, sizes: Sizes, generator: torch.Generator) -> Tensors:
    names = _common_names(rule)
    tokens = sizes.batch, sizes.tokens
    steps = sizes.batch, sizes.tokens * (family.WRITES if rule == "gated_delta_product" else 1)
    keys, values = (sizes.heads, sizes.key_size), (sizes.value_heads, sizes.value_size)
    channels = (sizes.key_size,) * (rule in family.CHANNEL_GATES)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def unit(*shape: int) -> Tensor:
        return normalize(normal(*shape), dim=-1)

    x: Tensors = {"q": normal(*tokens, *keys), "k": unit(*steps, *keys)}
    x["v"] = normal(*steps, *values)
    if "g" in names:
        x["g"] = -(10 ** (-3 * uniform(*tokens, sizes.value_heads, *channels)))
    if "beta" in names:
        x["beta"] = uniform(*steps, sizes.value_heads)
    if "a" in names:  # RWKV-7's; the general rule also moves what lies across
        direction = unit(*tokens, *keys)
        x["a"], x["b"] = -direction, direction * uniform(*tokens, *keys)
        if rule == "generalized_delta_rule":
            x["a"] = 0.8 * x["a"] + 0.1 * unit(*tokens, *keys)
            x["b"] = 0.8 * x["b"] + 0.1 * unit(*tokens, *keys)
    if "mu" in names:
        x["mu"] = 0.8 * uniform(*tokens, sizes.value_heads)
        x["eta"] = uniform(*tokens, sizes.value_heads)
        x["p"] = 0.9 * unit(*tokens, *keys)
    state = (sizes.batch, sizes.value_heads, sizes.key_size, sizes.value_size)
    x["initial_state"] = normal(*state)
    if rule == "momentum_delta_rule":
        x["initial_momentum"] = 0.5 * normal(*state)
    return x


def arguments(rule: str, x: Tensors) -> tuple[list[Any], Any]:
    """Positional arguments of a call, and its initial state."""
    positional: list[Any] = [x.get(name) for name in NAMES[rule]]
    if rule == "gated_delta_product":
        positional.append(family.WRITES)
    state: Any = x.get("initial_state")
    if rule == "momentum_delta_rule" and state is not None:
        state = (state, x["initial_momentum"])
    return positional, state


def call(rule: str, x: Tensors, use_qk_l2norm: bool = False) -> Results:
    """o and the final states by name."""
    positional, state = arguments(rule, x)
    return named(
        *getattr(ops, rule)(
            *positional, initial_state=state, output_final_state=True, use_qk_l2norm=use_qk_l2norm
        )
    )


def call_recurrent(rule: str, x: Tensors, use_qk_l2norm: bool = False) -> Results:
    """The same token by token, in place, on copies of the initial states."""
    q, v = x.get("q", x.get("r")), x["v"]
    assert q is not None
    shape = q.shape[0], v.shape[2], q.shape[3], v.shape[3]
    zeros = torch.zeros(shape, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
    states = [x["initial_state"].clone() if "initial_state" in x else zeros]
    positional: list[Any] = [x.get(name) for name in NAMES[rule]]
    function = getattr(ops, rule + "_recurrent_")
    if rule == "momentum_delta_rule":
        states.append(x["initial_momentum"].clone() if "initial_momentum" in x else zeros.clone())
        o = function(*positional[:-1], tuple(states), positional[-1], use_qk_l2norm=use_qk_l2norm)
    else:
        writes = [family.WRITES] * (rule == "gated_delta_product")
        o = function(*positional, *states, *writes, use_qk_l2norm=use_qk_l2norm)
    return named(o, tuple(states))


def expected(rule: str, x: Tensors, use_qk_l2norm: bool = False) -> Results:
    """The same by the oracle, token by token in fp64."""
    if rule in family.NAMES:
        return named(*family.expected(rule, x, use_qk_l2norm=use_qk_l2norm))
    return named(*oracle.delta_rule(**x, use_qk_l2norm=use_qk_l2norm))


def named(o: Tensor, states: Tensor | tuple[Tensor, ...]) -> Results:
    """Outputs by name, of a rule with one state or with two."""
    states = states if isinstance(states, tuple) else (states,)
    return {"o": o} | dict(zip(STATES, states, strict=False))


def with_gradients(
    function: Callable[[str, Tensors, bool], Results], rule: str, x: Tensors, regime: Regime
) -> Results:
    """Outputs, and as `d_…` the gradients of a loss that weighs each element of them at random."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    results = function(rule, leaves, regime.use_qk_l2norm)
    generator = torch.Generator().manual_seed(1)
    weights = [  # numbers that every type has
        torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype)
        for y in results.values()
    ]
    gradients = torch.autograd.grad(
        list(results.values()), list(leaves.values()), weights, materialize_grads=True
    )
    named = {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}
    return {name: y.detach() for name, y in results.items()} | named


def widened(x: Tensors) -> Tensors:
    """The same numbers in fp64."""
    return {name: tensor.double() for name, tensor in x.items()}
