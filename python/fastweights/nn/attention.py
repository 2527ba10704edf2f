import torch
from torch import Tensor, nn

from .. import ops
from ._projection import make_projection
from .config import LanguageModelConfig
from .state import AttentionState


class SlidingWindowAttention(nn.Module):
    """Attention over the last `attention_window` tokens and learned sinks.

    The arithmetic between the projections is `fastweights.ops.sliding_window_attention`.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        width, std = config.width, config.initializer_range
        heads, sinks, size = config.attention_heads, config.attention_sinks, config.head_size
        self.query = make_projection(width, width, std)
        self.key = make_projection(width, width, std)
        self.value = make_projection(width, width, std)
        self.output = make_projection(width, width, config.residual_range)
        self.sink_key = nn.Parameter(torch.randn(heads, sinks, size // 2) * std)
        self.sink_value = nn.Parameter(torch.randn(heads, sinks, size) * std)

    def initial_state(self, batch: int) -> AttentionState:
        config = self.config
        shape = (batch, config.attention_window, config.attention_heads, config.head_size)
        return AttentionState(self.sink_key.new_zeros(shape), self.sink_key.new_zeros(shape))

    def forward(
        self, x: Tensor, state: AttentionState, position: Tensor, in_place: bool = False
    ) -> tuple[Tensor, AttentionState]:
        """Reads x [B, T, width].

        Args:
            x: [B, T, width].
            state: what an earlier call returned.
            position: int64 [B], tokens seen.
            in_place: inference only: `state` is overwritten.
        """
        o, key, value = ops.sliding_window_attention(
            self.query(x),
            self.key(x),
            self.value(x),
            self.sink_key,
            self.sink_value,
            state.key,
            state.value,
            position,
            heads=self.config.attention_heads,
            window=self.config.attention_window,
            rope_base=self.config.rope_base,
            in_place=in_place,
        )
        return self.output(o), AttentionState(key, value)
