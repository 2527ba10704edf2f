"""Extreme gates, strengths, keys and values: outputs, states and gradients of every rule against
the fp64 oracle, with the tolerances of comparison.py. benchmarks/numerics measures the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import (
    GATE_GRADIENT_TOLERANCE,
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    relative_error,
    rms,
    smallest,
)
from regimes import (
    GATES,
    INFINITY,
    REGIMES,
    RULES,
    STATES,
    Regime,
    Results,
    Sizes,
    Tensors,
    call,
    call_recurrent,
    calls,
    expected,
    make,
    widened,
    with_gradients,
)

SIZES = Sizes(tokens=37)  # past a chunk of the forward pass, and one of the backward pass
FP16 = ("gates mixed", "zero keys, l2norm", "long keys, l2norm", "huge values", "denormal values")
CASES = [
    (rule, regime, dtype)
    for rule, regime in calls()
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float16 or regime.name in FP16
]


def tolerance_of(name: str, dtype: torch.dtype) -> float:
    if name == "o" or name in STATES:
        return OUTPUT_TOLERANCE[dtype]
    return (GATE_GRADIENT_TOLERANCE if name[2:] in GATES else GRADIENT_TOLERANCE)[dtype]


def assert_all_near(given: Results, exact: Results, dtype: torch.dtype) -> None:
    """Within the tolerances; a result below the normal numbers may be off by its own rounding and
    that of the arithmetic, once a token."""
    for name, wanted in exact.items():
        got = given[name]
        assert torch.isfinite(got).all(), f"{name} is not finite"
        error = relative_error(got, wanted)
        units = smallest(got.dtype) + SIZES.tokens * smallest(torch.float32)
        near = error <= tolerance_of(name, dtype) or rms(got.double() - wanted) <= units
        assert near, f"{name}: relative error {error:.2e}"


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize(("rule", "regime", "dtype"), CASES, ids=str)
def test_extremes(rule: str, regime: Regime, dtype: torch.dtype) -> None:
    x = make(rule, regime, dtype, SIZES)
    exact = with_gradients(expected, rule, widened(x), regime)
    assert_all_near(with_gradients(call, rule, x, regime), exact, dtype)
    forward = {name: exact[name] for name in exact if not name.startswith("d_")}
    assert_all_near(call_recurrent(rule, x, regime.use_qk_l2norm), forward, dtype)


def ordinary(rule: str, tokens: int = 45) -> Tensors:
    return make(rule, REGIMES[0], torch.float32, Sizes(tokens=tokens))


def reads_what_decays(rule: str) -> bool:
    """Whether a token reads the state as it was before its own decay."""
    return rule in ("generalized_delta_rule", "rwkv7", "momentum_delta_rule")


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "delta_rule"])
@pytest.mark.parametrize("at", [0, 11, 44])
def test_what_a_gate_of_minus_infinity_forgets_leaves_no_bit(rule: str, at: int) -> None:
    x = ordinary(rule)
    x["w" if rule == "rwkv7" else "g"][:, at] = -INFINITY
    if reads_what_decays(rule):
        x["a" if "a" in x else "p"][:, at] = 0.0
    if rule == "momentum_delta_rule":
        x["mu"][:, at] = 0.0
    other = x | {name: 1e6 * x[name] for name in x if name.startswith("initial")}
    one, two = call(rule, x), call(rule, other)
    assert not torch.equal(one["o"][:, :at], two["o"][:, :at]) or at == 0
    assert torch.equal(one["o"][:, at:], two["o"][:, at:])
    assert torch.equal(one["state"], two["state"])
    later = x["initial_state"].requires_grad_()
    call(rule, x | {"initial_state": later})["o"][:, at:].sum().backward()
    assert later.grad is not None
    assert torch.equal(later.grad, torch.zeros_like(later.grad))


@pytest.mark.parametrize("rule", ["delta_rule", "gated_delta_rule", "kda", "gated_delta_product"])
@pytest.mark.parametrize("cause", ["beta", "k"])
def test_what_writes_nothing_changes_no_bit_of_the_state(rule: str, cause: str) -> None:
    x = ordinary(rule)
    x[cause] = torch.zeros_like(x[cause])
    if "g" in x:
        x["g"] = torch.zeros_like(x["g"])
    assert torch.equal(call(rule, x)["state"], x["initial_state"])


@pytest.mark.parametrize("rule", RULES)
def test_values_of_any_scale_have_the_same_rounding(rule: str) -> None:
    """The rules are linear in v and in the states: a power of two leaves no trace."""
    x, factor = ordinary(rule), 2.0**60
    scaled = {name: x[name] * factor for name in x if name == "v" or name.startswith("initial")}
    one, two = call(rule, x), call(rule, x | scaled)
    for name, result in one.items():
        assert torch.equal(result * factor, two[name])


def test_tables_of_the_page_are_those_of_the_result() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "numerics" / "tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
