import torch
from torch import Tensor, nn

from .attention import SlidingWindowAttention
from .config import LanguageModelConfig
from .feed_forward import SwiGLU
from .memory import FastWeightMemory
from .normalization import RMSNorm
from .state import BlockState


class Block(nn.Module):
    """A transformer block whose mixer is attention and memory side by side.

    ``x ← x + mix_attention · attention(n) + mix_memory · memory(n)`` with n = mixer_norm(x), then
    ``x ← x + feed_forward(feed_forward_norm(x))``.

    Attributes:
        attention_enabled: False leaves the branch out (ablation); its state stays as it was.
        memory_enabled: the same for the memory.
    """

    mix_attention: nn.Parameter  # [width], of a block that has attention
    mix_memory: nn.Parameter  # [width], of a block that has a memory

    def __init__(self, config: LanguageModelConfig, layer: int = 0) -> None:
        super().__init__()
        width = config.width
        self.attention_enabled = True
        self.memory_enabled = True
        self.attention: SlidingWindowAttention | None = None
        self.memory: FastWeightMemory | None = None
        self.mixer_norm = RMSNorm(width, config.norm_epsilon)
        if config.attention:
            self.attention = SlidingWindowAttention(config)
            self.mix_attention = nn.Parameter(torch.ones(width))
        if config.memory:
            self.memory = FastWeightMemory(config, layer)
            self.mix_memory = nn.Parameter(torch.ones(width))
        self.feed_forward_norm = RMSNorm(width, config.norm_epsilon)
        self.feed_forward = SwiGLU(config)
        self.dropout = config.dropout

    def initial_state(self, batch: int) -> BlockState:
        return BlockState(
            self.memory.initial_state(batch) if self.memory is not None else None,
            self.attention.initial_state(batch) if self.attention is not None else None,
        )

    def forward(
        self,
        x: Tensor,
        state: BlockState,
        position: Tensor,
        in_place: bool = False,
        memory_keep: Tensor | None = None,
        write_strength: Tensor | None = None,
    ) -> tuple[Tensor, BlockState]:
        """Reads x [B, T, width].

        Args:
            x: [B, T, width].
            state: what an earlier call returned.
            position: int64 [B], tokens seen.
            in_place: inference only: `state` may be overwritten.
            memory_keep: [B, 1, 1], 0 where the row's memory is dropped.
            write_strength: fp32 [B, T], how strongly each token is learned (1 without it).
        """
        mixed, state = self._mix(x, state, position, in_place, memory_keep, write_strength)
        return mixed + self._drop(self.feed_forward(self.feed_forward_norm(mixed))), state

    def _drop(self, o: Tensor) -> Tensor:
        return nn.functional.dropout(o, self.dropout, self.training)

    def _mix(
        self,
        x: Tensor,
        state: BlockState,
        position: Tensor,
        in_place: bool,
        memory_keep: Tensor | None,
        write_strength: Tensor | None,
    ) -> tuple[Tensor, BlockState]:
        normed = self.mixer_norm(x)
        memory, attention = state
        if self.attention is not None and self.attention_enabled:
            o, attention = self.attention(normed, attention, position, in_place)
            x = torch.addcmul(x, self.mix_attention, self._drop(o))
        if self.memory is not None and self.memory_enabled:
            o, memory = self.memory(normed, memory, in_place, write_strength)
            mix: Tensor = self.mix_memory
            scale = mix if memory_keep is None else mix * memory_keep
            x = torch.addcmul(x, scale, self._drop(o))
        return x, BlockState(memory, attention)
