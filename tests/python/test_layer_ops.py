"""What lies between the projections, against its plain definition in fp64."""

from functools import partial

import pytest
import torch
from comparison import assert_near
from oracle import delta_rule
from torch import Tensor
from torch.nn.functional import silu, softplus

import fastweights
from fastweights import ops


def convolution_by_definition(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    inputs = torch.cat([state, x], 1)
    taps = weight.shape[1]
    rows = [(inputs[:, t : t + taps] * weight.T).sum(1) for t in range(x.shape[1])]
    return silu(torch.stack(rows, 1)) if rows else x


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("taps", [1, 4])
def test_short_convolution(tokens: int, taps: int) -> None:
    x = torch.randn(2, tokens, 6, dtype=torch.float64)
    weight = torch.randn(6, taps, dtype=torch.float64)
    state = torch.randn(2, taps - 1, 6, dtype=torch.float64)
    y, after = ops.short_convolution(x, weight, state)
    assert_near("y", y, convolution_by_definition(x, weight, state), 1e-13)
    assert torch.equal(after, torch.cat([state, x], 1)[:, tokens:])
    fresh, _ = ops.short_convolution(x, weight)
    assert_near("y", fresh, convolution_by_definition(x, weight, torch.zeros_like(state)), 1e-13)


def test_short_convolution_gradients() -> None:
    x, weight, state = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 3), (3, 4), (2, 3, 3))
    )
    assert torch.autograd.gradcheck(ops.short_convolution, (x, weight, state))


def test_norms_and_swiglu() -> None:
    x, gate = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert_near("rms_norm", ops.rms_norm(x, weight, 1e-6), normed, 1e-13)
    assert_near("gated", ops.gated_rms_norm(x, gate, weight, 1e-6), normed * silu(gate), 1e-13)
    assert_near("swiglu", ops.swiglu(gate, x), silu(gate) * x, 1e-13)
    narrow = ops.rms_norm(x.bfloat16(), weight.float(), 1e-6)
    assert narrow.dtype == torch.bfloat16
    assert_near("rms_norm", narrow, normed, 1e-2)


def test_norms_and_swiglu_gradients() -> None:
    x, gate = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(partial(ops.rms_norm, eps=1e-6), (x, weight))
    assert gradcheck(partial(ops.gated_rms_norm, eps=1e-6), (x, gate, weight))
    assert gradcheck(ops.swiglu, (gate, x))


def test_opcheck() -> None:
    x, gate = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    weight = torch.randn(4, requires_grad=True)
    taps, past = torch.randn(4, 3, requires_grad=True), torch.randn(2, 2, 4, requires_grad=True)
    registered, opcheck = torch.ops.fastweights, torch.library.opcheck
    opcheck(registered.rms_norm.default, (x, weight, 1e-6))
    opcheck(registered.gated_rms_norm.default, (x, gate, weight, 1e-6))
    opcheck(registered.swiglu.default, (gate, x))
    opcheck(registered.short_convolution.default, (x, taps, past))
    opcheck(registered.short_convolution.default, (x, taps))


class MemoryInputs:
    """Arguments of fast_weight_memory: H = 2, HV = 4, K = 3, V = 5."""

    heads, value_heads, key_size, value_size, taps = 2, 4, 3, 5, 4

    def __init__(self, tokens: int, dtype: torch.dtype = torch.float64) -> None:
        keys, values = self.heads * self.key_size, self.value_heads * self.value_size

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype)

        self.query, self.key = normal(2, tokens, keys), normal(2, tokens, keys)
        self.value, self.gate = normal(2, tokens, values), normal(2, tokens, values)
        self.beta, self.decay = normal(2, 2, tokens, self.value_heads)
        self.convolution_weight = normal(2 * keys + values, self.taps)
        self.a_log, self.dt_bias = normal(2, self.value_heads)
        self.norm_weight = normal(self.value_size)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.state = normal(2, self.value_heads, self.key_size, self.value_size).to(wide)
        self.conv = normal(2, self.taps - 1, 2 * keys + values)

    def call(
        self, rule: str = "gated_delta_rule", in_place: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.fast_weight_memory(
            self.query, self.key, self.value, self.beta, self.decay, self.gate,
            self.convolution_weight, self.a_log, self.dt_bias, self.norm_weight,
            self.state, self.conv, heads=self.heads, value_heads=self.value_heads,
            beta_max=1.5, rule=rule, eps=1e-6, in_place=in_place,
        )  # fmt: skip

    def by_definition(self, rule: str) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.query, self.key, self.value], -1)
        x = convolution_by_definition(x, self.convolution_weight, self.conv)
        keys = self.heads * self.key_size
        q, k, v = x.split([keys, keys, x.shape[-1] - 2 * keys], -1)
        g = -self.a_log.exp() * softplus(self.decay + self.dt_bias)
        o, state = delta_rule(
            q.unflatten(-1, (self.heads, -1)),
            k.unflatten(-1, (self.heads, -1)),
            v.unflatten(-1, (self.value_heads, -1)),
            1.5 * torch.sigmoid(self.beta),
            g=g if rule == "gated_delta_rule" else None,
            initial_state=self.state,
            use_qk_l2norm=True,
        )
        normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.norm_weight
        return (normed * silu(self.gate.unflatten(-1, (self.value_heads, -1)))).flatten(-2), state


@pytest.mark.parametrize("rule", ["gated_delta_rule", "delta_rule"])
@pytest.mark.parametrize("tokens", [1, 7, 70])
@pytest.mark.parametrize("in_place", [False, True])
def test_fast_weight_memory(rule: str, tokens: int, in_place: bool) -> None:
    inputs = MemoryInputs(tokens)
    expected, expected_state = inputs.by_definition(rule)
    o, state, conv = inputs.call(rule, in_place)
    assert_near("o", o, expected, 1e-11)
    assert_near("state", state, expected_state, 1e-11)
    everything = torch.cat(
        [inputs.conv, torch.cat([inputs.query, inputs.key, inputs.value], -1)], 1
    )
    assert torch.equal(conv, everything[:, tokens:])


def test_fast_weight_memory_gradients() -> None:
    inputs = MemoryInputs(4)
    names = ("query", "value", "beta", "decay", "gate", "convolution_weight", "a_log", "state")

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for name, tensor in zip(names, tensors, strict=True):
            setattr(inputs, name, tensor)
        return inputs.call()

    tensors = [getattr(inputs, name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_fast_weight_memory_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    inputs = MemoryInputs(9, torch.float32)
    inputs.value.requires_grad_()
    expected = inputs.call()
    given = torch.compile(lambda: inputs.call(), fullgraph=True, backend="aot_eager")()
    for name, mine, theirs in zip(("o", "state", "conv"), given, expected, strict=True):
        assert_near(name, mine, theirs, 1e-5)


def test_fast_weight_memory_errors() -> None:
    inputs = MemoryInputs(3)
    with pytest.raises(fastweights.ShapeError, match=r'rule must be .* got "other"'):
        inputs.call("other")
    inputs.beta = inputs.beta[..., :3]
    with pytest.raises(
        fastweights.ShapeError, match=r"fast_weight_memory: beta must be \[B, T, HV"
    ):
        inputs.call()


class AttentionInputs:
    """Arguments of sliding_window_attention: two heads of 8, window 5, two sinks."""

    heads, size, window, sinks = 2, 8, 5, 2

    def __init__(self, tokens: int, batch: int = 2) -> None:
        width = self.heads * self.size
        self.query, self.key, self.value = torch.randn(3, batch, tokens, width, dtype=torch.float64)
        self.sink_key = torch.randn(self.heads, self.sinks, self.size // 2, dtype=torch.float64)
        self.sink_value = torch.randn(self.heads, self.sinks, self.size, dtype=torch.float64)

    def call(self, pieces: list[int], in_place: bool = False) -> Tensor:
        """All tokens in pieces, the caches carried along."""
        ring = (self.query.shape[0], self.window, self.heads, self.size)
        keys, values = torch.full((2, *ring), 9.0, dtype=torch.float64)  # never seen at position 0
        position = torch.zeros(ring[0], dtype=torch.int64)
        outputs, begin = [], 0
        for count in pieces:
            part = slice(begin, begin + count)
            o, keys, values = ops.sliding_window_attention(
                self.query[:, part], self.key[:, part], self.value[:, part],
                self.sink_key, self.sink_value, keys, values, position,
                heads=self.heads, window=self.window, in_place=in_place,
            )  # fmt: skip
            outputs.append(o)
            position, begin = position + count, begin + count
        return torch.cat(outputs, 1)

    def by_definition(self) -> Tensor:
        tokens = self.query.shape[1]
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (self.query, self.key, self.value))
        q, k = rotated(q), rotated(k)
        sink_key = torch.cat([torch.zeros_like(self.sink_key), self.sink_key], -1)
        rows = []
        for t in range(tokens):
            near = slice(max(0, t - self.window + 1), t + 1)
            scores = torch.cat(
                [
                    torch.einsum("bhd,bshd->bhs", q[:, t], k[:, near]),
                    torch.einsum("bhd,hsd->bhs", q[:, t], sink_key),
                ],
                -1,
            )
            weights = (scores / self.size**0.5).softmax(-1)
            seen, sunk = weights.split([scores.shape[-1] - self.sinks, self.sinks], -1)
            rows.append(
                torch.einsum("bhs,bshd->bhd", seen, v[:, near])
                + torch.einsum("bhs,hsd->bhd", sunk, self.sink_value)
            )
        return torch.stack(rows, 1).flatten(-2)


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of the first half of the last axis of x [B, T, heads, D]."""
    quarter = x.shape[-1] // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequency
    a, b, rest = x.split([quarter, quarter, 2 * quarter], -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@pytest.mark.parametrize(
    "pieces", [[23], [1] * 23, [3, 20], [5, 5, 13], [16, 0, 7], [1, 2, 4, 16]], ids=str
)
@pytest.mark.parametrize("in_place", [False, True])
def test_sliding_window_attention(pieces: list[int], in_place: bool) -> None:
    inputs = AttentionInputs(23)
    assert_near("o", inputs.call(pieces, in_place), inputs.by_definition(), 1e-12)


def test_sliding_window_attention_rows_start_at_their_own_position() -> None:
    inputs = AttentionInputs(6)
    keys, values = torch.randn(2, 2, inputs.window, inputs.heads, inputs.size, dtype=torch.float64)

    def run(rows: slice, position: list[int]) -> Tensor:
        return ops.sliding_window_attention(
            inputs.query[rows], inputs.key[rows], inputs.value[rows], inputs.sink_key,
            inputs.sink_value, keys[rows], values[rows], torch.tensor(position),
            heads=inputs.heads, window=inputs.window,
        )[0]  # fmt: skip

    both = run(slice(0, 2), [0, 17])
    assert_near("fresh row", both[:1], run(slice(0, 1), [0]), 1e-13)
    assert_near("fresh row", both[:1], inputs.by_definition()[:1], 1e-12)
    assert_near("old row", both[1:], run(slice(1, 2), [17]), 1e-13)


def test_sliding_window_attention_far_away_is_as_exact_as_near() -> None:
    inputs = AttentionInputs(6)
    empty = torch.zeros(2, inputs.window, inputs.heads, inputs.size)

    def read_from(start: int) -> Tensor:
        return ops.sliding_window_attention(
            inputs.query.float(), inputs.key.float(), inputs.value.float(),
            inputs.sink_key.float(), inputs.sink_value.float(), empty, empty,
            torch.full((2,), start), heads=inputs.heads, window=inputs.window,
        )[0]  # fmt: skip

    assert_near("o", read_from(10_000_000), read_from(inputs.window), 2e-6)


def test_sliding_window_attention_gradients() -> None:
    inputs = AttentionInputs(6, batch=1)
    tensors = [
        x.requires_grad_()
        for x in (inputs.query, inputs.key, inputs.value, inputs.sink_key, inputs.sink_value)
    ]
    position = torch.zeros(1, dtype=torch.int64)

    def function(q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor, sink_v: Tensor) -> Tensor:
        return ops.sliding_window_attention(
            q, k, v, sink_k, sink_v, None, None, position, heads=inputs.heads, window=inputs.window
        )[0]

    assert torch.autograd.gradcheck(function, tensors)


def test_sliding_window_attention_errors() -> None:
    inputs = AttentionInputs(3)
    inputs.value = inputs.value[:, :2]
    with pytest.raises(fastweights.ShapeError, match="sliding_window_attention: value must be"):
        inputs.call([3])
