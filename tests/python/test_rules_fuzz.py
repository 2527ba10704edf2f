"""Random calls of the rules: sizes, element types, layouts of every kind (gaps, axes in any order,
broadcast, overlapping), packing, and calls with one thing wrong.

A case is made from its seed alone. A failure prints the line that repeats it; for more cases than
the suite runs:

    FASTWEIGHTS_FUZZ_SEED=1000 FASTWEIGHTS_FUZZ_CASES=20000 pytest tests/python/test_rules_fuzz.py
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import family
import numpy
import oracle
import pytest
import torch
from comparison import OUTPUT_TOLERANCE, assert_near
from regimes import GATES, NAMES, RULES, Results, Tensors, arguments, call_recurrent, named
from torch import Tensor

from fastweights import ops
from fastweights.errors import ShapeError

FIRST = int(os.environ.get("FASTWEIGHTS_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FASTWEIGHTS_FUZZ_CASES", "1" if FIRST else "200"))
SEEDS = range(FIRST, FIRST + CASES)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@contextmanager
def reproduction(seed: int, case: object) -> Iterator[None]:
    """Adds to a failure what was called, and the line that calls it again."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        test = os.environ.get("PYTEST_CURRENT_TEST", "test_rules_fuzz.py").split("::")[-1]
        name = test.partition("[")[0]
        line = f"FASTWEIGHTS_FUZZ_SEED={seed} pytest tests/python/test_rules_fuzz.py -k {name}"
        raise AssertionError(f"{error}\n{case}\n{line}") from error


@dataclass
class Case:
    """A call: its tensors by the rule's names, states among them, and its options."""

    rule: str
    tensors: Tensors
    cu_seqlens: Tensor | None = None
    use_qk_l2norm: bool = False
    scale: float | None = None
    layouts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        def shown(name: str) -> str:
            x = self.tensors[name]
            kind = str(x.dtype).removeprefix("torch.")
            return (
                f"{name}: {kind}{list(x.shape)} strides {x.stride()} {self.layouts.get(name, '')}"
            )

        lines = [f"{self.rule}(", *(f"  {shown(name)}" for name in self.tensors)]
        cuts = None if self.cu_seqlens is None else self.cu_seqlens.tolist()
        return "\n".join([*lines, f"  cu_seqlens={cuts}, l2norm={self.use_qk_l2norm})"])

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["v"].dtype

    def options(self) -> dict[str, Any]:
        return {
            "cu_seqlens": self.cu_seqlens,
            "use_qk_l2norm": self.use_qk_l2norm,
            "scale": self.scale,
            "output_final_state": True,
        }


# ---- layouts -------------------------------------------------------------------------------------


def strides_of(shape: tuple[int, ...], rng: random.Random) -> tuple[str, list[int]]:
    """How a tensor lies in memory, and its strides."""
    kind = rng.choice(("dense", "dense", "gaps", "order", "broadcast", "overlap", "row", "column"))
    axes = list(range(len(shape)))[::-1]  # from the innermost outwards
    if kind in ("order", "broadcast"):
        rng.shuffle(axes)
    strides = [0] * len(shape)
    step = rng.choice((2, 3)) if kind == "column" else 1
    for axis in axes:
        strides[axis] = step
        step *= max(shape[axis], 1)
        if kind in ("gaps", "row"):
            step += rng.randrange(3)
    if kind == "broadcast":
        for axis in rng.sample(axes, rng.randint(1, len(axes))):
            strides[axis] = 0
    if kind == "overlap":  # windows that move on by one element
        strides = [rng.choice((0, 1, 1, 2)) for _ in shape]
    return kind, strides


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, draw: Any, rng: random.Random) -> Any:
    """A tensor of drawn numbers in a random layout, NaN wherever it has no element."""
    kind, strides = strides_of(shape, rng)
    offset = rng.choice((0, 0, 1, 3))
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
    length = offset + reach + 1 + rng.choice((0, 2))
    base = torch.full((length,), torch.nan, dtype=torch.float32)
    places = torch.arange(length).as_strided(shape, strides, offset).unique()
    base[places] = draw(len(places))
    return kind, base.to(dtype).as_strided(shape, strides, offset)


# ---- cases ---------------------------------------------------------------------------------------


def make_case(seed: int, packed: bool | None = None) -> Case:
    rng = random.Random(seed)
    rule = rng.choice(RULES)
    dtype = rng.choice(DTYPES)
    rows = rng.choice((0, 1, 1, 2, 3))
    tokens = rng.choice((0, 1, 7, 8, 9, rng.randrange(70), rng.randrange(70)))
    heads = rng.choice((1, 2, 3))
    value_heads = heads * rng.choice((1, 1, 2, 3))
    sizes = [rng.choice((1, 3, 16, 17, 33, 64, rng.randint(1, 40))) for _ in range(2)]
    case = Case(rule, {}, use_qk_l2norm=rng.random() < 0.3)
    if rule == "rwkv7":
        case.scale = rng.choice((None, 0.5))
    states = rows
    if rng.random() < 0.3 if packed is None else packed:
        rows = 1
        cuts = sorted(rng.randint(0, tokens) for _ in range(rng.randrange(4)))
        cuts = [0, *cuts, tokens] if tokens or rng.random() < 0.5 else [0]
        case.cu_seqlens = torch.tensor(cuts)
        states = len(cuts) - 1
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Any:
        return lambda count: low + (high - low) * torch.rand(count, generator=generator)

    def gate(count: int) -> Tensor:
        x = torch.rand(count, generator=generator)
        choices = torch.tensor([0.0, -1e-6, -50.0, -torch.inf])
        extreme = choices[torch.randint(4, (count,), generator=generator)]
        return torch.where(x < 0.2, extreme, -x * x)

    def put(name: str, shape: tuple[int, ...], draw: Any, of: torch.dtype) -> None:
        case.layouts[name], case.tensors[name] = laid_out(shape, of, draw, rng)

    # Keys stay within length 1, lest β‖k‖² pass 2.
    width = sizes[0] ** -0.5
    draws = {
        name: uniform(-width, width) if name in ("k", "p") else uniform(-0.3 * width, 0.3 * width)
        for name in ("k", "p", "a", "b")
    }
    draws |= {"q": uniform(-1, 1), "v": uniform(-1, 1), "g": gate}
    draws |= {"beta": uniform(0, 1 if rule == "momentum_delta_rule" else 2)}
    draws |= {"mu": uniform(0, 0.8), "eta": uniform(0, 1)}
    steps = tokens * (family.WRITES if rule == "gated_delta_product" else 1)
    optional = {"linear_attention": ("g",), "gated_delta_product": ("g",)}
    for name in NAMES[rule]:
        if (name == "p" or name in optional.get(rule, ())) and rng.random() < 0.4:
            continue
        common = {"r": "q", "w": "g"}.get(name, name)
        length = steps if common in ("k", "v", "beta") else tokens
        last = (sizes[1] if common == "v" else sizes[0],)
        of_keys = common in family.KEYS
        if name in GATES and not (common == "g" and rule in family.CHANNEL_GATES):
            last = ()
        gate_type = torch.float32 if dtype != torch.float64 and rng.random() < 0.4 else dtype
        put(
            name,
            (rows, length, heads if of_keys else value_heads, *last),
            draws[common],
            gate_type if name in GATES else dtype,
        )
    if rng.random() < 0.6:
        state_type = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (states, value_heads, *sizes)
        put("initial_state", shape, uniform(-1, 1), state_type)
        if rule == "momentum_delta_rule":
            put("initial_momentum", shape, uniform(-1, 1), state_type)
    return case


def call(case: Case, tensors: Tensors) -> Results:
    positional, state = arguments(case.rule, tensors)
    return named(*getattr(ops, case.rule)(*positional, initial_state=state, **case.options()))


def expected(case: Case) -> Results:
    options = {"cu_seqlens": case.cu_seqlens, "use_qk_l2norm": case.use_qk_l2norm}
    exact = {name: x.double() for name, x in case.tensors.items()}
    if case.rule in family.NAMES:
        if case.scale is not None:
            exact["r"] = exact["r"] * case.scale
            assert not case.use_qk_l2norm
        return named(*family.expected(case.rule, exact, **options))
    return named(*oracle.delta_rule(**exact, **options))


def gradients(results: Results, leaves: Tensors) -> Tensors:
    weights = [torch.ones_like(y) for y in results.values()]
    values = torch.autograd.grad(
        list(results.values()), list(leaves.values()), weights, materialize_grads=True
    )
    return dict(zip(leaves, values, strict=True))


def leaves_of(tensors: Tensors) -> Tensors:
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


# ---- tests ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("seed", SEEDS)
def test_any_layout_gives_what_the_oracle_gives(seed: int) -> None:
    """Outputs near the oracle's, and with their gradients the bits of a call on dense tensors."""
    case = make_case(seed)
    if case.scale is not None:
        case.use_qk_l2norm = False
    with reproduction(seed, case):
        given = leaves_of(case.tensors)
        dense = leaves_of({name: x.contiguous() for name, x in case.tensors.items()})
        results, of_dense = call(case, given), call(case, dense)
        slopes, of_dense_slopes = gradients(results, given), gradients(of_dense, dense)
        for name, exact in expected(case).items():
            assert_near(name, results[name], exact, OUTPUT_TOLERANCE[case.dtype])
            assert torch.equal(results[name], of_dense[name]), f"{name} depends on the layout"
        for name, slope in slopes.items():
            assert slope.isfinite().all(), f"d{name} is not finite"
            assert torch.equal(slope, of_dense_slopes[name]), f"d{name} depends on the layout"


@pytest.mark.parametrize("seed", SEEDS[: max(1, CASES // 4)])
def test_recurrent_form_of_any_layout(seed: int) -> None:
    case = make_case(seed, packed=False)
    case.scale = None
    with reproduction(seed, case):
        results = call_recurrent(case.rule, case.tensors, case.use_qk_l2norm)
        for name, exact in expected(case).items():
            assert_near(name, results[name], exact, OUTPUT_TOLERANCE[case.dtype])


def wrong_shape(name: str, x: Tensor, rng: random.Random) -> Tensor:
    """One axis longer or shorter, one axis more or less."""
    axes = range(2) if name == "v" else range(x.dim())  # v says itself what HV and V are
    axis = rng.choice(axes)
    kind = rng.choice(("longer", "shorter", "less", "more"))
    if kind == "less" and x.dim() > 1:
        return x.new_zeros(x.shape[1:])
    if kind == "more":
        return x.new_zeros((1, *x.shape))
    shape = list(x.shape)
    shape[axis] += -1 if kind == "shorter" and shape[axis] else 1
    return x.new_zeros(shape)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_wrong_tensor_is_named(seed: int) -> None:
    case = make_case(seed)
    rng = random.Random(seed)
    query = NAMES[case.rule][0]  # it says what the others must be
    name = rng.choice([name for name in case.tensors if name != query])
    wrong = case.tensors[name]
    if rng.random() < 0.3:
        wrong = torch.zeros(wrong.shape, dtype=rng.choice((torch.int64, torch.bool)))
    else:
        wrong = wrong_shape(name, wrong, rng)
    rule = {"rwkv7": "generalized_delta_rule"}.get(case.rule, case.rule)
    shown = {"w": "g"}.get(name, name) if case.rule == "rwkv7" else name
    with reproduction(seed, case), pytest.raises(ShapeError, match=f"^{rule}: {shown} must"):
        call(case, case.tensors | {name: wrong})


@pytest.mark.parametrize("seed", SEEDS[: max(1, CASES // 4)])
def test_wrong_borders_are_named(seed: int) -> None:
    case = make_case(seed, packed=True)
    assert case.cu_seqlens is not None
    cuts = case.cu_seqlens.tolist()
    rng = random.Random(seed)
    kind = rng.choice(("first", "last", "order", "type", "axes"))
    wrong = torch.tensor(cuts)
    if kind == "first":
        wrong[0] = rng.choice((-1, 1))
    elif kind == "last" or len(cuts) < 3:
        wrong[-1] = cuts[-1] + 1
    elif kind == "order":
        wrong[1] = cuts[-1] + 1
    elif kind == "type":
        wrong = wrong.to(torch.int32)
    else:
        wrong = wrong[None]
    case.cu_seqlens = wrong
    with reproduction(seed, case), pytest.raises(ShapeError, match="cu_seqlens"):
        call(case, case.tensors)


def test_negative_strides_are_refused_before_a_rule_sees_them() -> None:
    """PyTorch has no tensor of negative strides; each way to one says so."""
    reversed_rows = numpy.zeros((1, 5, 1, 4), dtype=numpy.float32)[:, ::-1]
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(reversed_rows)
    with pytest.raises(RuntimeError, match=r"[Nn]egative strides"):
        torch.zeros(20).as_strided((1, 5, 1, 4), (20, -4, 4, 1), 16)
    with pytest.raises(ValueError, match="step must be greater than zero"):
        torch.zeros(1, 5, 1, 4)[:, ::-1]
