"""RWKV-7 "Goose" as a language model on `fastweights.ops.rwkv7`, with its state carried.

Peng et al. 2025, arXiv:2503.14456. Parameters have the names and shapes of RWKV-7's own .pth files,
so `state_dict()` is such a file's content and `load_state_dict` reads one; layer 0 has no v0, v1,
v2. Initial values and ranks are those of RWKV-LM (RWKV-v7/train_temp). The matrix states here are
[B, H, K, V] as everywhere in this library; RWKV's own are the transpose.

B rows, T tokens, C width, H heads of N = C / H channels, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastweights import ops
from fastweights.errors import StateMismatch
from fastweights.io import load_metadata, load_tensors, save_tensors

# Decays lie in (exp(-exp(-1/2)), 1): no channel forgets more than 45% of itself at one token.
DECAY = math.exp(-0.5)
GROUP_NORM_EPSILON = 64e-5


@dataclass(frozen=True)
class RWKV7Config:
    """Sizes. Ranks of the low-rank maps follow from the width unless given."""

    vocabulary_size: int = 256
    width: int = 256
    layers: int = 4
    head_size: int = 64
    feed_forward_width: int = 1024
    decay_rank: int = 0
    rate_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0

    def __post_init__(self) -> None:
        if self.width % self.head_size:
            raise ValueError(
                f"rwkv7: width {self.width} is no multiple of head_size {self.head_size}"
            )
        factors = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5.0}
        for name, factor in factors.items():
            if getattr(self, name) == 0:
                rank = max(32, round(factor * self.width**0.5 / 32) * 32)
                object.__setattr__(self, name, rank)

    @property
    def heads(self) -> int:
        return self.width // self.head_size


class RWKV7State(NamedTuple):
    """All that the model carries from token to token."""

    time_shift: Tensor  # [B, L, C], the last input of each time mix
    matrix: Tensor  # [B, L, H, N, N], keys before values, fp32
    channel_shift: Tensor  # [B, L, C], the last input of each channel mix

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return self._asdict()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RWKV7State:
        """The inverse of `tensors`."""
        return cls(**tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> RWKV7State:
        return RWKV7State(*map(function, self))

    def detach(self) -> RWKV7State:
        """The same values, cut from the graph: truncates back-propagation through time."""
        return self.map(Tensor.detach)

    def reset_rows(self, mask: Tensor) -> RWKV7State:
        """A state whose rows where `mask` (bool [B]) is true are as at the start: zero."""
        return self.map(lambda x: x.masked_fill(mask.view(-1, *[1] * (x.dim() - 1)), 0))


class RWKV7Output(NamedTuple):
    """Unpacks as ``logits, state``."""

    logits: Tensor | None  # [B, T, vocabulary], at least fp32; None if not wanted
    state: RWKV7State


def shifted(x: Tensor, last: Tensor) -> Tensor:
    """Each token's predecessor: [B, T, C] of x [B, T, C] and what came before it [B, C]."""
    return torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)


class TimeMix(nn.Module):
    """RWKV-7's mixing over time: token shift, the generalised delta rule, group norm, gate.

    Beside the receptance r, key k and value v, each token has by low-rank maps a decay w of every
    channel, an in-context learning rate a, a gate g and, behind the first layer, a share by which
    v is replaced by the first layer's. The state forgets by w, the direction of k ⊙ k_k is
    unlearned at the rate a, and what is written is v at the key k ⊙ (1 + (a − 1) ⊙ k_a).
    """

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = config.heads, layer
        width, size = config.width, config.head_size
        depth = layer / max(config.layers - 1, 1)  # 0 … 1
        left = 1.0 - layer / config.layers  # 1 … almost 0
        place = torch.arange(width) / width
        linear = torch.arange(width) / (width - 1) - 0.5
        zigzag = torch.arange(width) % size / ((size - 1) / 2) - 1
        zigzag = zigzag * zigzag.abs()

        def mix(power: float) -> nn.Parameter:
            return _channels(1 - place ** (power * left))

        self.x_r, self.x_w, self.x_k = mix(0.2), mix(0.9), mix(0.7)
        self.x_v, self.x_a, self.x_g = mix(0.7), mix(0.9), mix(0.2)
        self.w0 = _channels(-5.5 + 6 * (linear + 0.5) ** (1 + depth**0.3) + 2.5 * zigzag)
        self.w1, self.w2 = _low_rank(width, config.decay_rank)
        self.a0 = _channels(-0.19 + 0.3 * zigzag + 0.4 * linear)
        self.a1, self.a2 = _low_rank(width, config.rate_rank)
        if layer > 0:
            self.v0 = _channels(0.73 - 0.4 * linear)
            self.v1, self.v2 = _low_rank(width, config.value_rank)
        self.g1, self.g2 = _low_rank(width, config.gate_rank)
        self.k_k = _channels(0.71 - 0.1 * linear)
        self.k_a = _channels(torch.full((width,), 1.02))
        self.r_k = nn.Parameter(torch.full((self.heads, size), -0.04))
        self.receptance = _projection(width, width, 0.5)
        self.key = _projection(width, width, 0.05)
        self.value = _projection(width, width, 0.5)
        self.output = _projection(width, width, 0.0)
        self.ln_x = nn.GroupNorm(self.heads, width, eps=GROUP_NORM_EPSILON)
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / config.layers) ** 0.7)

    def forward(
        self, x: Tensor, last: Tensor, matrix: Tensor, first_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mixes x [B, T, C].

        Args:
            x: the block's normed input.
            last: [B, C], x at the token before.
            matrix: [B, H, N, N], the state.
            first_value: [B, T, C], layer 0's values; None in layer 0.

        Returns:
            The branch's output [B, T, C], the state after the last token, layer 0's values.
        """
        delta = shifted(x, last) - x

        def mixed(weight: Tensor) -> Tensor:
            return torch.addcmul(x, delta, weight)

        r = self.receptance(mixed(self.x_r)).to(x.dtype)
        key = self.key(mixed(self.x_k)).to(x.dtype)
        value_input = mixed(self.x_v)
        v = self.value(value_input).to(x.dtype)
        decay = self.w0 + torch.tanh(mixed(self.x_w) @ self.w1) @ self.w2
        w = -DECAY * torch.sigmoid(decay.float())
        rate = torch.sigmoid(self.a0 + mixed(self.x_a) @ self.a1 @ self.a2)
        gate = torch.sigmoid(mixed(self.x_g) @ self.g1) @ self.g2
        if first_value is None:
            first_value = v
        else:
            share = torch.sigmoid(self.v0 + value_input @ self.v1 @ self.v2)
            v = torch.lerp(v, first_value, share)
        direction = functional.normalize(self._by_head(key * self.k_k), dim=-1)
        k = self._by_head(key * torch.addcmul(1 - self.k_a, rate, self.k_a))
        r, w, v, rate = map(self._by_head, (r, w, v, rate))
        o, after = ops.rwkv7(
            r,
            w,
            k,
            v,
            -direction,
            direction * rate,
            initial_state=matrix,
            output_final_state=True,
        )
        assert after is not None
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        o = self.ln_x(o.flatten(0, 1).flatten(1)).view_as(x) + bonus.flatten(2)
        return self.output(o * gate), after, first_value

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, T, H, N] of [B, T, C]."""
        return x.view(*x.shape[:-1], self.heads, -1)


class ChannelMix(nn.Module):
    """RWKV-7's feed-forward layer: token shift, then two projections around a squared ReLU."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width = config.width
        place = torch.arange(width) / width
        self.x_k = _channels(1 - place ** ((1.0 - layer / config.layers) ** 4))
        self.key = _projection(width, config.feed_forward_width, 0.5)
        self.value = _projection(config.feed_forward_width, width, 0.0)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        """[B, T, C] of the block's normed input x and its last value before, [B, C]."""
        k = torch.addcmul(x, shifted(x, last) - x, self.x_k)
        y: Tensor = self.value(torch.relu(self.key(k)).square())
        return y


class Block(nn.Module):
    """Time mix and channel mix, each on a layer norm of the residual stream."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.width)  # of the embedding
        self.ln1, self.ln2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)


class RWKV7(nn.Module):
    """The language model. Without a state it starts from zero."""

    def __init__(self, config: RWKV7Config | None = None) -> None:
        super().__init__()
        self.config = config = config or RWKV7Config()
        self.emb = nn.Embedding(config.vocabulary_size, config.width)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        gain = 0.5 * max(1.0, config.vocabulary_size / config.width) ** 0.5
        nn.init.orthogonal_(self.head.weight, gain)

    def initial_state(self, batch: int) -> RWKV7State:
        """The state before the first token."""
        config, weight = self.config, self.head.weight
        shift = weight.new_zeros(batch, config.layers, config.width)
        size = config.head_size
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape = (batch, config.layers, config.heads, size, size)
        return RWKV7State(shift, weight.new_zeros(shape, dtype=wide), shift.clone())

    def forward(
        self,
        tokens: Tensor,
        state: RWKV7State | None = None,
        *,
        logits: bool = True,
        last_logits_only: bool = False,
    ) -> RWKV7Output:
        """Reads T ≥ 1 tokens of each row, int64 [B, T]; gradients flow through `state`."""
        if state is None:
            state = self.initial_state(tokens.shape[0])
        self._check_state(state, tokens.shape[0])
        x = self.emb(tokens)
        first_value = None
        time_shift, matrices, channel_shift = [], [], []
        for layer, block in enumerate(self._blocks()):
            if layer == 0:
                x = block.ln0(x)
            normed = block.ln1(x)
            y, matrix, first_value = block.att(
                normed, state.time_shift[:, layer], state.matrix[:, layer], first_value
            )
            x = x + y
            time_shift.append(normed[:, -1])
            matrices.append(matrix)
            normed = block.ln2(x)
            x = x + block.ffn(normed, state.channel_shift[:, layer])
            channel_shift.append(normed[:, -1])
        after = RWKV7State(*(torch.stack(a, 1) for a in (time_shift, matrices, channel_shift)))
        if not logits:
            return RWKV7Output(None, after)
        y = self.head(self.ln_out(x[:, -1:] if last_logits_only else x))
        return RWKV7Output(y if y.dtype == torch.float64 else y.float(), after)

    def _check_state(self, state: RWKV7State, batch: int) -> None:
        for name, tensor in self.initial_state(batch).tensors().items():
            given = state.tensors()[name]
            if given.shape != tensor.shape:
                raise StateMismatch(
                    f"rwkv7: {name} must be {list(tensor.shape)}, got {list(given.shape)}"
                )

    def parameter_count(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]


def save_rwkv7(path: Path, model: RWKV7, dtype: torch.dtype) -> None:
    """Writes a safetensors file: matrices in `dtype`, vectors in fp32, sizes in its metadata."""
    tensors = {
        name: tensor.to(dtype) if tensor.dim() == 2 else tensor
        for name, tensor in model.state_dict().items()
    }
    sizes = {name: str(value) for name, value in asdict(model.config).items()}
    save_tensors(path, tensors, sizes)


def load_rwkv7(path: Path) -> RWKV7:
    """What `save_rwkv7` wrote, in fp32 and evaluation mode."""
    sizes = {name: int(value) for name, value in load_metadata(path).items()}
    model = RWKV7(RWKV7Config(**sizes))
    model.load_state_dict({name: x.float() for name, x in load_tensors(path).items()})
    return model.eval().requires_grad_(False)


# ---- initial values


def _channels(values: Tensor) -> nn.Parameter:
    """One value a channel, [1, 1, C]."""
    return nn.Parameter(values.float().view(1, 1, -1))


def _low_rank(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """[C, rank] of zeros and an orthogonal [rank, C]: their product starts at zero."""
    second = torch.empty(rank, width)
    nn.init.orthogonal_(second, 0.1 * max(1.0, rank / width) ** 0.5)
    return nn.Parameter(torch.zeros(width, rank)), nn.Parameter(second)


def _projection(inputs: int, outputs: int, scale: float) -> nn.Linear:
    """Uniform in ± scale / √inputs."""
    linear = nn.Linear(inputs, outputs, bias=False)
    bound = scale / inputs**0.5
    nn.init.uniform_(linear.weight, -bound, bound)
    return linear
