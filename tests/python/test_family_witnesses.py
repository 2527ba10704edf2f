"""Independent implementations of the rules: the naive files of fla-core, which need no Triton."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import Case
from comparison import assert_near
from family import FamilyCase, call, make
from torch import Tensor

CASE = Case(tokens=37, sizes=(24, 40), heads=(2, 2))


def naive(path: str) -> ModuleType:
    """fla/ops/<path>/naive.py, loaded alone from where scripts/setup puts it.

    The package needs Triton, and transformers changes its own path where it can import fla.
    """
    file = Path(sys.prefix) / "witnesses" / "fla" / "ops" / path / "naive.py"
    assert file.exists(), "run scripts/setup: the witnesses are not installed"
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(rule: str, tensors: dict[str, Tensor], o: Tensor, *states: Tensor) -> None:
    mine, mine_states = call(rule, tensors)
    assert_near("o", mine, o, 1e-5)
    for got, theirs in zip(mine_states, states, strict=True):
        assert_near("state", got, theirs, 1e-5)


def test_kda() -> None:
    x = make(FamilyCase("kda", CASE))
    o, state = naive("kda").naive_recurrent_kda(
        x["q"], x["k"], x["v"], x["g"], x["beta"], None, x["initial_state"], True
    )
    check("kda", x, o, state)


def test_kda_with_grouped_values() -> None:
    x = make(FamilyCase("kda", Case(tokens=37, sizes=(24, 40), heads=(2, 4))))
    o, state = naive("kda").naive_recurrent_kda(
        x["q"], x["k"], x["v"], x["g"], x["beta"], None, x["initial_state"], True
    )
    check("kda", x, o, state)


def test_linear_attention() -> None:
    x = make(FamilyCase("linear_attention", CASE))
    o, state = naive("simple_gla").naive_recurrent_simple_gla(
        x["q"], x["k"], x["v"], x["g"], None, x["initial_state"], True
    )
    check("linear_attention", x, o, state)


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_gated_delta_product(gate: str) -> None:
    x = make(FamilyCase("gated_delta_product", Case(tokens=37, heads=(2, 2), gate=gate)))
    o, state = naive("gated_delta_product").naive_recurrent_gated_delta_product(
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
    check("gated_delta_product", x, o, state)


def test_generalized_delta_rule() -> None:
    x = make(FamilyCase("generalized_delta_rule", CASE))
    rows = (x[name].transpose(1, 2) for name in ("q", "k", "v", "a", "b", "g"))
    o, state = naive("generalized_delta_rule/dplr").dplr_recurrence(
        *rows, initial_state=x["initial_state"]
    )
    check("generalized_delta_rule", x, o.transpose(1, 2), state)


def test_momentum_delta_rule() -> None:
    x = make(FamilyCase("momentum_delta_rule", CASE))
    # Their momentum has the opposite sign, and they take the logarithm of μ.
    witness: Any = naive("momentum_delta_rule").recurrent_momentum_delta_rule_ref
    o, pair = witness(
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
    check("momentum_delta_rule", x, o, pair[0], -pair[1])


def test_rwkv7_scale_is_one() -> None:
    x = make(FamilyCase("rwkv7", CASE))
    o, _ = call("rwkv7", x)
    unscaled, _ = call("rwkv7", x, scale=1.0)
    assert torch.equal(o, unscaled)
