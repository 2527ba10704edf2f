"""Independent implementations of the rules: the naive files of fla-core, and RWKV-7 as rwkv has it.

Outputs, final states and, by autograd through the witness, the gradient of every input.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from comparison import assert_near
from family import FamilyCase, call, make
from rules import loss_of
from torch import Tensor
from torch.nn.functional import group_norm, normalize
from witnesses import function, naive

from fastweights import ops

Tensors = dict[str, Tensor]
Witness = Callable[[Tensors], tuple[Tensor, ...]]  # o and the final states

CASE = Case(tokens=37, sizes=(24, 40), heads=(2, 2))
GROUPED = Case(tokens=37, sizes=(24, 40), heads=(2, 4))


def kda(x: Tensors) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = naive("kda").naive_recurrent_kda(
        x["q"], x["k"], x["v"], x["g"], x["beta"], None, x["initial_state"], True
    )
    return result


def linear_attention(x: Tensors) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = naive("simple_gla").naive_recurrent_simple_gla(
        x["q"], x["k"], x["v"], x["g"], None, x["initial_state"], True
    )
    return result


def gated_delta_product(x: Tensors) -> tuple[Tensor, ...]:
    witness = naive("gated_delta_product").naive_recurrent_gated_delta_product
    result: tuple[Tensor, ...] = witness(
        x["q"],
        x["k"],
        x["v"],
        x.get("g"),
        x["beta"],
        x["q"].shape[-1] ** -0.5,
        initial_state=x["initial_state"].clone(),
        output_final_state=True,
        num_householder=2,
    )
    return result


def generalized_delta_rule(x: Tensors) -> tuple[Tensor, ...]:
    rows = (x[name].transpose(1, 2) for name in ("q", "k", "v", "a", "b", "g"))
    witness = naive("generalized_delta_rule/dplr").dplr_recurrence
    o, state = witness(*rows, initial_state=x["initial_state"])
    return o.transpose(1, 2), state


def momentum_delta_rule(x: Tensors) -> tuple[Tensor, ...]:
    # Their momentum has the opposite sign, and they take the logarithm of μ.
    witness: Any = naive("momentum_delta_rule").recurrent_momentum_delta_rule_ref
    o, (state, momentum) = witness(
        x["q"],
        x["k"],
        x["v"],
        x["g"],
        x["mu"].log(),
        x["p"],
        x["beta"],
        x["eta"],
        initial_S=x["initial_state"],
        initial_M=-x["initial_momentum"],
        output_final_state=True,
    )
    return o, state, -momentum


@pytest.mark.parametrize(
    ("witness", "case"),
    [
        (kda, CASE),
        (kda, GROUPED),
        (linear_attention, CASE),
        (gated_delta_product, CASE),
        (gated_delta_product, Case(tokens=37, heads=(2, 2), gate="none")),
        (generalized_delta_rule, CASE),
        (momentum_delta_rule, CASE),
    ],
    ids=str,
)
def test_fla_agrees(witness: Any, case: Case) -> None:
    rule = witness.__name__
    x = {name: t.detach().requires_grad_() for name, t in make(FamilyCase(rule, case)).items()}
    o, states = call(rule, x)
    compare(x, (o, *states), witness(x))


def compare(x: Tensors, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Results and the gradients of the leaves `x`."""
    for name, one, other in zip(("o", "state", "momentum"), mine, theirs, strict=False):
        assert_near(name, one, other, 1e-5)
    assert len(mine) == len(theirs)
    wanted = list(x.values())
    got = torch.autograd.grad(loss(mine), wanted)
    exact = torch.autograd.grad(loss(theirs), wanted)
    for name, one, other in zip(x, got, exact, strict=True):
        assert_near(f"d{name}", one, other, 1e-4)


def loss(results: tuple[Tensor, ...]) -> Tensor:
    o, *states = results
    total = o.new_zeros((), dtype=torch.float64)
    for seed, state in enumerate(states, start=1):
        total = total + loss_of(o, state, seed)
    return total


# ---- RWKV-7's time mixing ---------------------------------------------------------------------

HEADS, SIZE, RANK, TOKENS = 3, 8, 5, 11
WIDTH = HEADS * SIZE


def time_mixing() -> Tensors:
    """Weights of the layer by the names of the package's arguments, and its input and states."""
    generator = torch.Generator().manual_seed(4)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * size[0] ** -0.5

    x = {"x": 3 * normal(TOKENS, WIDTH), "x_prev": 3 * normal(WIDTH), "v_first": normal(WIDTH)}
    x["v_first"] = 3 * normal(TOKENS, WIDTH)
    x["state"] = normal(HEADS, SIZE, SIZE)
    for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
        x[name] = torch.rand(WIDTH, generator=generator)
    for name in ("w", "a", "v"):
        x[name + "0"], x[name + "1"] = 3 * normal(WIDTH), normal(WIDTH, RANK)
        x[name + "2"] = normal(RANK, WIDTH)
    x["g1"], x["g2"] = normal(WIDTH, RANK), normal(RANK, WIDTH)
    x["k_k"], x["k_a"], x["r_k"] = (1 + normal(WIDTH) for _ in range(3))
    for name in ("R_", "K_", "V_", "O_"):
        x[name] = normal(WIDTH, WIDTH)
    x["ln_w"], x["ln_b"] = 1 + normal(WIDTH), normal(WIDTH)
    return x


# Their loop writes into a tensor that the mixing weights' gradients would need.
CONSTANT = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


def with_rwkv7(x: Tensors, layer: int) -> tuple[Tensor, Tensor]:
    """The layer over `ops.rwkv7`: what a model that uses it computes; and the state."""
    before = torch.cat([x["x_prev"][None], x["x"][:-1]])
    mixed = {n: torch.lerp(x["x"], before, x["x_" + n]) for n in ("r", "w", "k", "v", "a", "g")}
    r, key, v = (mixed[n] @ x[n.upper() + "_"] for n in ("r", "k", "v"))
    rate = torch.sigmoid(x["a0"] + mixed["a"] @ x["a1"] @ x["a2"])
    decay = x["w0"] + torch.tanh(mixed["w"] @ x["w1"]) @ x["w2"]
    if layer > 0:
        v = torch.lerp(v, x["v_first"], torch.sigmoid(x["v0"] + mixed["v"] @ x["v1"] @ x["v2"]))
    direction = normalize(by_head(key * x["k_k"]), dim=-1)
    k = key * (1 + (rate - 1) * x["k_a"])
    o, state = ops.rwkv7(
        by_head(r),
        by_head(-0.606531 * torch.sigmoid(decay)),
        by_head(k),
        by_head(v),
        -direction,
        direction * by_head(rate),
        initial_state=x["state"].mT[None],
        output_final_state=True,
    )
    assert state is not None
    o = group_norm(o.reshape(-1, WIDTH), HEADS, x["ln_w"], x["ln_b"], eps=64e-5)
    bonus = by_head(r * k * x["r_k"]).sum(-1, keepdim=True) * by_head(v)
    gate = torch.sigmoid(mixed["g"] @ x["g1"]) @ x["g2"]
    return (o + bonus.reshape(-1, WIDTH)) * gate @ x["O_"], state[0].mT


def by_head(rows: Tensor) -> Tensor:
    return rows.reshape(1, -1, HEADS, SIZE)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("one", [False, True], ids=["sequence", "token"])
def test_rwkv_agrees(layer: int, one: bool) -> None:
    x = time_mixing()
    name = "RWKV_x070_TMix_one" if one else "RWKV_x070_TMix_seq"
    if one:
        x["x"], x["v_first"] = x["x"][:1], x["v_first"][:1]
    x = {key: t.requires_grad_(key not in CONSTANT) for key, t in x.items()}
    given = dict(x)
    if one:
        given["x"], given["v_first"] = x["x"][0], x["v_first"][0]
    o, last, state, _ = function("rwkv/model.py", name)(layer, HEADS, SIZE, **given)
    assert torch.equal(last, x["x"][-1])
    mine = with_rwkv7(x, layer)
    unused = {"v_first", "v0", "v1", "v2"} if layer == 0 else set()
    leaves = {key: t for key, t in x.items() if t.requires_grad and key not in unused}
    compare(leaves, mine, (o.reshape(-1, WIDTH), state))


def test_rwkv7_scale_is_one() -> None:
    x = make(FamilyCase("rwkv7", CASE))
    o, _ = call("rwkv7", x)
    unscaled, _ = call("rwkv7", x, scale=1.0)
    assert torch.equal(o, unscaled)
