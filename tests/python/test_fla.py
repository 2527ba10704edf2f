"""fastweights.fla: the signatures of the installed fla-core, the results of its naive files."""

import ast
import importlib
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import witnesses
from comparison import assert_near
from rules import loss_of
from torch import Tensor
from torch.nn.functional import normalize

from fastweights import fla, ops
from fastweights.errors import ShapeError

Tensors = dict[str, Tensor]

# Function: the file of fla/ops that defines it.
FILES = {
    "chunk_delta_rule": "delta_rule/chunk.py",
    "fused_recurrent_delta_rule": "delta_rule/fused_recurrent.py",
    "chunk_gated_delta_rule": "gated_delta_rule/chunk.py",
    "fused_recurrent_gated_delta_rule": "gated_delta_rule/fused_recurrent.py",
    "chunk_kda": "kda/chunk.py",
    "fused_recurrent_kda": "kda/fused_recurrent.py",
    "chunk_gated_delta_product": "gated_delta_product/chunk.py",
    "chunk_dplr_delta_rule": "generalized_delta_rule/dplr/chunk.py",
    "fused_recurrent_dplr_delta_rule": "generalized_delta_rule/dplr/fused_recurrent.py",
    "chunk_rwkv7": "rwkv7/chunk.py",
    "fused_recurrent_rwkv7": "rwkv7/fused_recurrent.py",
    "fused_mul_recurrent_rwkv7": "rwkv7/fused_recurrent.py",
}
# Function: its tensors, in their order.
TENSORS = {
    "chunk_delta_rule": ("q", "k", "v", "beta"),
    "fused_recurrent_delta_rule": ("q", "k", "v", "beta"),
    "chunk_gated_delta_rule": ("q", "k", "v", "g", "beta"),
    "fused_recurrent_gated_delta_rule": ("q", "k", "v", "g", "beta"),
    "chunk_kda": ("q", "k", "v", "g", "beta"),
    "fused_recurrent_kda": ("q", "k", "v", "g", "beta"),
    "chunk_gated_delta_product": ("q", "k", "v", "g", "beta"),
    "chunk_dplr_delta_rule": ("q", "k", "v", "a", "b", "gk"),
    "fused_recurrent_dplr_delta_rule": ("q", "k", "v", "a", "b", "gk"),
    "chunk_rwkv7": ("r", "w", "k", "v", "a", "b"),
    "fused_recurrent_rwkv7": ("r", "w", "k", "v", "a", "b"),
    "fused_mul_recurrent_rwkv7": ("r", "w", "k", "v", "kk", "a"),
}
NORMALISING = [name for name in FILES if "dplr" not in name and "rwkv7" not in name]
GATED = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
KDA = ("chunk_kda", "fused_recurrent_kda")
V_FIRST = GATED + KDA
REVERSIBLE = ("fused_recurrent_dplr_delta_rule", "fused_mul_recurrent_rwkv7")
BY_COLUMN = (
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
)
WRITES = 2
TOKENS, KEYS, VALUES = 21, 12, 20


def make(name: str, value_heads: int = 4, batch: int = 2, sequences: int | None = None) -> Tensors:
    """Tensors of a call, its initial state among them."""
    generator = torch.Generator().manual_seed(3)
    heads = 2
    steps = TOKENS * (WRITES if name == "chunk_gated_delta_product" else 1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    rows = (batch, TOKENS, heads, KEYS)
    gates = (batch, TOKENS, value_heads)
    key = 0.9 * normalize(normal(batch, steps, heads, KEYS), dim=-1)
    low_rank = "dplr" in name or "rwkv7" in name
    x = {
        "q": normal(*rows),
        "k": key,
        "v": normal(batch, steps, value_heads, VALUES),
        "beta": uniform(batch, steps, value_heads),
        "g": -uniform(*gates, KEYS) if "kda" in name else -uniform(*gates),
        "gk": -uniform(*gates, KEYS),
        "kk": normalize(normal(*rows), dim=-1),
        "a": 0.5 * normalize(normal(*rows), dim=-1) if low_rank else normal(1),
        "b": 0.5 * normalize(normal(*rows), dim=-1),
        "initial_state": normal(sequences or batch, value_heads, KEYS, VALUES),
    }
    x["r"], x["w"] = x["q"], x["gk"]
    if name == "fused_mul_recurrent_rwkv7":
        x["a"] = uniform(*rows)
    return {key: x[key] for key in (*TENSORS[name], "initial_state")}


def call(name: str, x: Tensors, **options: Any) -> tuple[Tensor, Tensor]:
    """The function; tensors by name."""
    if name == "chunk_gated_delta_product":
        options["num_householder"] = WRITES
    o, state = getattr(fla, name)(**x, output_final_state=True, **options)
    return o, state


def expected(name: str, x: Tensors, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The same by fla's own naive functions, differentiable."""
    x = dict(x)
    if "rwkv7" in name:
        x["q"], x["gk"] = x.pop("r"), x.pop("w")
        if scale is None and name != "fused_recurrent_rwkv7":
            scale = 1.0
    if "kk" in x:
        x["a"], x["b"] = -x["kk"], x.pop("kk") * x["a"]
    state = x.pop("initial_state")
    groups = x["v"].shape[2] // x["q"].shape[2]
    for key in x.keys() & {"q", "k", "a", "b"}:
        x[key] = x[key].repeat_interleave(groups, dim=2)
    root = KEYS**-0.5
    scale = root if scale is None else scale
    if "product" in name:
        walk = witnesses.naive("gated_delta_product").naive_recurrent_gated_delta_product
        o, last = walk(
            **x, scale=scale, initial_state=state, output_final_state=True, num_householder=WRITES
        )
    elif "gated" in name:
        walk = witnesses.naive("gated_delta_rule").naive_recurrent_gated_delta_rule
        o, last = walk(**x, scale=scale, initial_state=state, output_final_state=True)
    elif "kda" in name:
        walk = witnesses.naive("kda").naive_recurrent_kda
        o, last = walk(**x, scale=scale, initial_state=state, output_final_state=True)
    else:  # heads first, and no scale
        x["q"] = x["q"] * (scale / root)
        if "dplr" in name or "rwkv7" in name:
            order = ("q", "k", "v", "a", "b", "gk")
            walk = witnesses.naive("generalized_delta_rule/dplr").dplr_recurrence
        else:
            order = ("q", "k", "v", "beta")
            walk = witnesses.naive("delta_rule").delta_rule_recurrence
        o, last = walk(*(x[key].transpose(1, 2) for key in order), initial_state=state)
        o = o.transpose(1, 2)
    return o, last


def leaves(x: Tensors) -> Tensors:
    return {name: tensor.detach().requires_grad_() for name, tensor in x.items()}


def check(x: Tensors, mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Results, and the gradients of the leaves `x`."""
    assert_near("o", mine[0], theirs[0], 1e-5)
    assert_near("final_state", mine[1], theirs[1], 1e-5)
    wanted = list(x.values())
    got = torch.autograd.grad(loss_of(*mine), wanted)
    exact = torch.autograd.grad(loss_of(*theirs), wanted)
    for name, one, other in zip(x, got, exact, strict=True):
        assert one.dtype == x[name].dtype
        assert_near(f"d{name}", one, other, 1e-4)


# ---- what fla-core's sources say --------------------------------------------------------------


def parameters_in_fla(name: str) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter of fla's function."""
    arguments = witnesses.definition(f"fla/ops/{FILES[name]}", name).args
    assert not arguments.posonlyargs
    assert not arguments.kwonlyargs
    assert arguments.vararg is None
    empty = inspect.Parameter.empty
    defaults = [empty] * (len(arguments.args) - len(arguments.defaults))
    defaults += [ast.literal_eval(node) for node in arguments.defaults]
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = [
        (argument.arg, kind, default)
        for argument, default in zip(arguments.args, defaults, strict=True)
    ]
    if arguments.kwarg is not None:
        found.append((arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD, empty))
    return found


def keywords_that_fla_reads(name: str) -> set[str]:
    """What fla's function takes out of its ``**kwargs``."""
    found = set()
    for node in ast.walk(witnesses.definition(f"fla/ops/{FILES[name]}", name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, key = node.func.value, node.args[0] if node.args else None
            if (
                isinstance(owner, ast.Name)
                and owner.id == "kwargs"
                and isinstance(key, ast.Constant)
            ):
                found.add(key.value)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
            (where,) = node.comparators
            if isinstance(where, ast.Name) and where.id == "kwargs":
                found.add(node.left.value)
    return found


@pytest.mark.parametrize("name", FILES)
def test_signatures_are_those_of_fla(name: str) -> None:
    mine = inspect.signature(getattr(fla, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in mine] == parameters_in_fla(name)


@pytest.mark.parametrize(
    "package",
    [
        "delta_rule",
        "gated_delta_rule",
        "kda",
        "gated_delta_product",
        "generalized_delta_rule/dplr",
        "rwkv7",
    ],
)
def test_every_function_of_a_rule_is_here(package: str) -> None:
    for node in ast.walk(witnesses.parsed(f"fla/ops/{package}/__init__.py")):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
    names = [n for n in names if not n.startswith("naive_") and n != "fused_chunk_delta_rule"]
    module = importlib.import_module("fastweights.fla." + package.split("/")[0])
    assert names
    for name in names:
        assert getattr(module, name) is getattr(fla, name)
        assert name in fla.__all__
        assert inspect.getdoc(getattr(fla, name))


def test_short_names_are_aliases() -> None:
    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        short = name.replace("gated_delta_rule", "gdn")
        assert getattr(fla, short) is getattr(fla, name)
        text = witnesses.source(f"fla/ops/{FILES[name]}").read_text(encoding="utf-8")
        assert f"\n{short} = {name}\n" in text


# ---- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("value_heads", [2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_agrees_with_the_naive_form(name: str, value_heads: int, scale: float | None) -> None:
    x = leaves(make(name, value_heads))
    options = {} if scale is None else {"scale": scale}
    check(x, call(name, x, **options), expected(name, x, scale))


@pytest.mark.parametrize("name", FILES)
def test_arguments_by_position(name: str) -> None:
    x = make(name)
    named: dict[str, Any] = x | {"num_householder": WRITES}
    parameters = parameters_in_fla(name)
    places = parameters[: [key for key, *_ in parameters].index("initial_state") + 1]
    o, _ = getattr(fla, name)(*(named.get(key, default) for key, _, default in places))
    assert torch.equal(o, call(name, x)[0])


@pytest.mark.parametrize("name", FILES)
def test_without_a_state(name: str) -> None:
    x = make(name)
    zero = x | {"initial_state": torch.zeros_like(x["initial_state"])}
    x.pop("initial_state")
    o, state = call(name, x)
    exact, last = expected(name, zero)
    assert_near("o", o, exact, 1e-5)
    assert_near("final_state", state, last, 1e-5)
    given = {"num_householder": WRITES} if "product" in name else {}
    _, left = getattr(fla, name)(**x, **given)
    assert (left is None) == (name != "fused_recurrent_rwkv7")


@pytest.mark.parametrize("name", NORMALISING)
def test_normalised_keys(name: str) -> None:
    x = make(name)
    x["k"] = 3.0 * x["k"]
    x = leaves(x)
    unit = dict(x)
    for key in ("q", "k"):
        unit[key] = x[key] * torch.rsqrt(x[key].square().sum(-1, keepdim=True) + 1e-6)
    check(x, call(name, x, use_qk_l2norm_in_kernel=True), expected(name, unit))


BORDERS = (0, 5, 5, 6, TOKENS)


def parts(name: str, x: Tensors) -> Iterator[Tensors]:
    """The sequences of packed tensors."""
    for n, (begin, end) in enumerate(itertools.pairwise(BORDERS)):
        part = {}
        for key, tensor in x.items():
            steps = WRITES if "product" in name and key in ("k", "v", "beta") else 1
            rows = tensor[n : n + 1] if key == "initial_state" else None
            part[key] = tensor[:, begin * steps : end * steps] if rows is None else rows
        yield part


def joined(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, 1), torch.cat(states)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_packed_sequences(name: str, dtype: torch.dtype) -> None:
    x = leaves(make(name, batch=1, sequences=len(BORDERS) - 1))
    mine = call(name, x, cu_seqlens=torch.tensor(BORDERS, dtype=dtype))
    check(x, mine, joined([expected(name, part) for part in parts(name, x)]))


@pytest.mark.parametrize("name", REVERSIBLE)
@pytest.mark.parametrize("packed", [False, True])
def test_reverse(name: str, packed: bool) -> None:
    x = leaves(make(name, batch=1, sequences=len(BORDERS) - 1 if packed else 1))

    def turned(part: Tensors) -> tuple[Tensor, Tensor]:
        turn = {key: t if key == "initial_state" else t.flip(1) for key, t in part.items()}
        o, state = expected(name, turn)
        return o.flip(1), state

    if packed:
        mine = call(name, x, reverse=True, cu_seqlens=torch.tensor(BORDERS))
        check(x, mine, joined([turned(part) for part in parts(name, x)]))
    else:
        check(x, call(name, x, reverse=True), turned(x))


@pytest.mark.parametrize("borders", [(0, 5), (0, 9, 5, TOKENS)])
def test_reverse_refuses_borders_as_the_operator_does(borders: tuple[int, ...]) -> None:
    x = make("fused_mul_recurrent_rwkv7", batch=1, sequences=len(borders) - 1)
    with pytest.raises(ShapeError, match="cu_seqlens must"):
        call("fused_mul_recurrent_rwkv7", x, reverse=True, cu_seqlens=torch.tensor(borders))


def gate_of_fla(name: str, lower_bound: float | None) -> Callable[..., Tensor]:
    """fla's own definition of the gate that its kernels form."""
    if name in GATED:
        return witnesses.function("fla/ops/gated_delta_rule/gate.py", "naive_gdn_gate")
    if lower_bound is None:
        return witnesses.function("fla/ops/kda/gate.py", "naive_kda_gate")
    bounded = witnesses.function("fla/ops/kda/gate.py", "naive_kda_lowerbound_gate")
    return lambda *tensors: bounded(*tensors, lower_bound=lower_bound)


@pytest.mark.parametrize(
    ("name", "lower_bound", "bias", "rate"),
    [(n, None, bias, True) for n in V_FIRST for bias in (False, True)]
    + [(n, -5.0, bias, rate) for n in KDA for bias in (False, True) for rate in (False, True)],
)
def test_gate_in_kernel(name: str, lower_bound: float | None, bias: bool, rate: bool) -> None:
    x = make(name)
    x["g"] = 3.0 * torch.randn(x["g"].shape)
    if rate:
        x["A_log"] = torch.rand(4)
    if bias:
        x["dt_bias"] = torch.randn(4 if name in GATED else 4 * KEYS)
    x = leaves(x)
    options: dict[str, Any] = {} if lower_bound is None else {"lower_bound": lower_bound}
    mine = call(name, x, use_gate_in_kernel=True, **options)
    plain = dict(x)
    gate = gate_of_fla(name, lower_bound)
    plain["g"] = gate(x["g"], plain.pop("A_log", None), plain.pop("dt_bias", None))
    check(x, mine, expected(name, plain))


@pytest.mark.parametrize("name", V_FIRST)
def test_rate_and_bias_count_only_with_the_gate(name: str) -> None:
    x = make(name)
    plain = call(name, x)
    bound = {"lower_bound": -5.0} if name in KDA else {}
    given = call(name, x, A_log=torch.rand(4), dt_bias=torch.rand(4), **bound)
    assert torch.equal(plain[0], given[0])


@pytest.mark.parametrize("name", V_FIRST)
@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_sigmoid_in_kernel(name: str, allow_neg_eigval: bool) -> None:
    x = make(name)
    x["beta"] = torch.randn(x["beta"].shape)
    x = leaves(x)
    mine = call(name, x, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=allow_neg_eigval)
    strength = x["beta"].sigmoid() * (2 if allow_neg_eigval else 1)
    check(x, mine, expected(name, x | {"beta": strength}))


@pytest.mark.parametrize("name", V_FIRST)
@pytest.mark.parametrize("keyword", ["state_v_first", "transpose_state_layout"])
def test_state_v_first(name: str, keyword: str) -> None:
    x = make(name)
    turned = leaves(x | {"initial_state": x["initial_state"].mT.contiguous()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        o, state = call(name, turned, **{keyword: True})
    former = keyword == "transpose_state_layout"
    assert any(issubclass(w.category, DeprecationWarning) for w in caught) == former
    assert state.is_contiguous()
    exact, last = expected(name, turned | {"initial_state": turned["initial_state"].mT})
    check(turned, (o, state), (exact, last.mT))


# ---- what only the recurrent functions can ----------------------------------------------------


def walk(x: Tensors) -> tuple[Tensor, Tensor]:
    """The delta rule in fp64 under every gate at once."""
    x = {name: tensor.double() for name, tensor in x.items()}
    groups = x["v"].shape[2] // x["q"].shape[2]
    q, k = (x[name].repeat_interleave(groups, dim=2) for name in ("q", "k"))
    state = x["initial_state"]
    beta = x["beta"] if x["beta"].dim() == 4 else x["beta"][..., None]
    outputs = []
    for t in range(q.shape[1]):
        if "g" in x:
            state = state * x["g"][:, t, :, None, None].exp()
        if "gk" in x:
            state = state * x["gk"][:, t, :, :, None].exp()
        if "gv" in x:
            state = state * x["gv"][:, t, :, None, :].exp()
        error = x["v"][:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + k[:, t, :, :, None] * (beta[:, t] * error)[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t] * KEYS**-0.5))
    return torch.stack(outputs, 1), state


GATE_SETS = [
    gates for count in range(4) for gates in itertools.combinations(("g", "gk", "gv"), count)
]


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("gates", GATE_SETS, ids="-".join)
def test_every_gate_of_the_recurrent_function(gates: tuple[str, ...], by_column: bool) -> None:
    name = "fused_recurrent_gated_delta_rule"
    x = make(name)
    shape = x["v"].shape
    x["gk"], x["gv"] = -torch.rand(*shape[:3], KEYS), -torch.rand(shape)
    if by_column:
        x["beta"] = torch.rand(shape)
    x = leaves({key: t for key, t in x.items() if key not in ("g", "gk", "gv") or key in gates})
    check(x, call(name, x), walk(x))


@pytest.mark.parametrize("name", BY_COLUMN)
def test_a_strength_for_each_column(name: str) -> None:
    x = make(name)
    x["beta"] = torch.rand(x["v"].shape)
    x = leaves(x)
    exact = dict(x)
    if "kda" in name:
        exact["gk"] = exact.pop("g")
    check(x, call(name, x), walk(exact))


def test_a_strength_for_each_column_as_in_the_naive_form() -> None:
    name = "fused_recurrent_delta_rule"
    x = make(name, value_heads=2)
    x["beta"] = torch.rand(x["v"].shape)
    x = leaves(x)
    check(x, call(name, x), expected(name, x))


@pytest.mark.parametrize("name", BY_COLUMN)
def test_columns_of_packed_sequences(name: str) -> None:
    x = make(name, batch=1, sequences=len(BORDERS) - 1)
    x["beta"] = torch.rand(x["v"].shape)
    mine = call(name, x, cu_seqlens=torch.tensor(BORDERS))
    exact = dict(x)
    if "kda" in name:
        exact["gk"] = exact.pop("g")
    whole = [walk(p) if p["q"].shape[1] else None for p in parts(name, exact)]
    outputs = torch.cat([result[0] for result in whole if result is not None], 1)
    assert_near("o", mine[0], outputs, 1e-5)
    for n, result in enumerate(whole):
        state = x["initial_state"][n : n + 1] if result is None else result[1]
        assert_near("final_state", mine[1][n : n + 1], state, 1e-5)


@pytest.mark.parametrize("name", ["fused_recurrent_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_a_missing_strength_is_one(name: str) -> None:
    x = make(name)
    ones = x | {"beta": torch.ones_like(x["beta"])}
    x.pop("beta")
    assert torch.equal(call(name, x)[0], call(name, ones)[0])


# ---- what only chunk_kda can ------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_states_before_each_chunk(packed: bool, state_v_first: bool, with_state: bool) -> None:
    size = 4
    places = BORDERS if packed else (0, TOKENS)
    x = make("chunk_kda", batch=1 if packed else 2, sequences=len(BORDERS) - 1 if packed else 2)
    given = x | {"initial_state": x["initial_state"].mT} if state_v_first else dict(x)
    if not with_state:
        x["initial_state"] = torch.zeros_like(x["initial_state"])
        given.pop("initial_state")
    packing = {"cu_seqlens": torch.tensor(BORDERS)} if packed else {}
    o, state, before = fla.chunk_kda(  # type: ignore[misc]
        **given,
        **packing,
        output_final_state=True,
        return_intermediate_states=True,
        chunk_size=size,
        state_v_first=state_v_first,
    )
    whole = call("chunk_kda", given, state_v_first=state_v_first, **packing)
    assert_near("o", o, whole[0], 1e-6)
    assert_near("final_state", state, whole[1], 1e-6)
    wanted = []
    for n, (begin, end) in enumerate(itertools.pairwise(places)):
        rows = x["initial_state"][n : n + 1] if packed else x["initial_state"]
        for start in range(begin, end, size):
            cut = {k: t[:, begin:start] for k, t in x.items() if k != "initial_state"}
            wanted.append(expected("chunk_kda", cut | {"initial_state": rows})[1])
    exact = torch.stack(wanted, 1)
    assert_near("states", before, exact.mT if state_v_first else exact, 1e-5)


# ---- types ------------------------------------------------------------------------------------

MIXED = {
    "q": torch.bfloat16,
    "k": torch.float32,
    "v": torch.float16,
    "a": torch.bfloat16,
    "b": torch.float32,
    "g": torch.bfloat16,
    "gk": torch.float64,
    "beta": torch.float16,
    "kk": torch.float16,
    "r": torch.bfloat16,
    "w": torch.float64,
    "initial_state": torch.bfloat16,
}


@pytest.mark.parametrize("name", FILES)
def test_mixed_types(name: str) -> None:
    x = leaves({key: t.to(MIXED[key]) for key, t in make(name).items()})
    exact = leaves({key: t.detach().float() for key, t in x.items()})
    o, state = call(name, x)
    exact_o, exact_state = expected(name, exact)
    of_v = name.startswith("fused") and name != "fused_recurrent_delta_rule"
    assert o.dtype == (torch.float16 if of_v else torch.bfloat16)
    assert state.dtype == torch.float32
    assert_near("o", o, exact_o, 5e-3)
    assert_near("final_state", state, exact_state, 1e-5)
    got = torch.autograd.grad(loss_of(o, state), list(x.values()))
    wanted = torch.autograd.grad(loss_of(exact_o, exact_state), list(exact.values()))
    for key, one, other in zip(x, got, wanted, strict=True):
        assert one.dtype == x[key].dtype
        assert_near(f"d{key}", one, other, 8e-3)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_one_type_for_all(name: str, dtype: torch.dtype) -> None:
    x = {key: t.to(dtype) for key, t in make(name).items()}
    o, state = call(name, x)
    exact, last = expected(name, {key: t.float() for key, t in x.items()})
    assert o.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near("o", o, exact, 1e-5 if dtype == torch.float64 else 5e-3)
    assert_near("final_state", state, last, 1e-5 if dtype == torch.float64 else 5e-3)


# ---- arguments without effect, and errors -----------------------------------------------------

WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "chunk_delta_rule": {"cu_seqlens_cpu": None, "chunk_size": 32},
    "chunk_gated_delta_rule": {"cu_seqlens_cpu": None, "chunk_indices": None, "chunk_size": 16},
    "chunk_kda": {
        "safe_gate": True,
        "disable_recompute": True,
        "use_graph": True,
        "max_num_seqs": 7,
        "chunk_size": 32,
        "cp_context": None,
    },
    "chunk_gated_delta_product": {"cu_seqlens_cpu": None, "cp_context": None},
    "chunk_dplr_delta_rule": {
        "safe_gate": True,
        "chunk_size": 32,
        "disable_recompute": True,
        "lower_bound": -2.0,
    },
    "chunk_rwkv7": {
        "safe_gate": True,
        "chunk_size": 32,
        "disable_recompute": True,
        "lower_bound": -2.0,
    },
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_arguments_that_steer_kernels_change_no_bit(name: str) -> None:
    x = make(name, batch=1, sequences=len(BORDERS) - 1)
    packing = torch.tensor(BORDERS)
    steering = {
        key: packing if key in ("cu_seqlens_cpu", "chunk_indices") else value
        for key, value in WITHOUT_EFFECT[name].items()
    }
    o, state = call(name, x, cu_seqlens=packing)
    steered, steered_state = call(name, x, cu_seqlens=packing, **steering)
    assert torch.equal(o, steered)
    assert torch.equal(state, steered_state)


@pytest.mark.parametrize("name", FILES)
def test_unknown_keywords_are_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}.*'no_such'") as caught:
        call(name, make(name), no_such=1)
    *parameters, last = [key for key, *_ in parameters_in_fla(name)]
    if last == "kwargs":  # else the message is Python's own
        known = str(caught.value).split("known: ")[1].split(", ")
        assert known[: len(parameters)] == parameters
        assert keywords_that_fla_reads(name) - {"head_first"} <= set(known)


@pytest.mark.parametrize("name", FILES)
def test_heads_first_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="head_first"):
        call(name, make(name), head_first=True)


@pytest.mark.parametrize(
    "name", [n for n in FILES if "cp_context" in (p[0] for p in parameters_in_fla(n))]
)
def test_a_sequence_over_devices_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{name}: cp_context must be None, got object"):
        call(name, make(name), cp_context=object())


@pytest.mark.parametrize("name", V_FIRST)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_neg_eigval": True}, "allow_neg_eigval needs use_beta_sigmoid_in_kernel=True"),
        ({"use_gate_in_kernel": True}, "use_gate_in_kernel needs A_log, got None"),
        (
            {"state_v_first": True, "transpose_state_layout": True},
            "transpose_state_layout is the former name of state_v_first",
        ),
        (
            {"use_gate_in_kernel": True, "A_log": torch.zeros(3)},
            r"A_log must have HV = 4 elements, got \[3\]",
        ),
        (
            {"use_gate_in_kernel": True, "A_log": torch.zeros(4), "dt_bias": torch.zeros(2, 3)},
            r"dt_bias must have HV( \* K)? = (4|48) elements, got \[2, 3\]",
        ),
        (
            {"state_v_first": True},
            re.escape("initial_state must be [N, HV, V, K] with [V, K] = [20, 12], got [2, 4, 12"),
        ),
    ],
)
def test_errors_say_which_argument(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        call(name, make(name), **options)


@pytest.mark.parametrize("name", KDA)
def test_a_lower_bound_is_below_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: lower_bound must be below 0, got 0.5"):
        call(name, make(name), use_gate_in_kernel=True, lower_bound=0.5)


def test_a_safe_gate_needs_its_bound() -> None:
    with pytest.raises(ValueError, match=r"^chunk_kda: safe_gate with use_gate_in_kernel needs"):
        call("chunk_kda", make("chunk_kda"), use_gate_in_kernel=True, safe_gate=True)


def test_a_gate_in_kernel_needs_a_gate() -> None:
    name = "fused_recurrent_gated_delta_rule"
    x = make(name)
    x.pop("g")
    with pytest.raises(ValueError, match=f"^{name}: use_gate_in_kernel needs g, got None"):
        call(name, x, use_gate_in_kernel=True, A_log=torch.zeros(4))


@pytest.mark.parametrize("name", FILES)
def test_shapes_are_checked_by_the_operator(name: str) -> None:
    x = make(name)
    x["v"] = x["v"][:, 1:]
    with pytest.raises(ShapeError, match=r"v must be"):
        call(name, x)


@pytest.mark.parametrize("name", FILES)
def test_integers_are_refused(name: str) -> None:
    x = make(name)
    for key in x:
        if name == "fused_mul_recurrent_rwkv7" and key == "a":
            continue  # only a factor of what the operator gets
        with pytest.raises(ShapeError, match="must be"):
            call(name, x | {key: x[key].to(torch.int64)})


@pytest.mark.parametrize("name", ["chunk_kda", "chunk_gated_delta_rule", "chunk_rwkv7"])
def test_compiles_without_graph_breaks(name: str) -> None:
    x = make(name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_near("o", compiled(name, x)[0], call(name, x)[0], 1e-6)


def test_the_same_operator_runs() -> None:
    x = make("chunk_gated_delta_rule")
    o, state = call("chunk_gated_delta_rule", x)
    direct, last = ops.gated_delta_rule(**x, output_final_state=True)
    assert last is not None
    assert torch.equal(o, direct)
    assert torch.equal(state, last)
