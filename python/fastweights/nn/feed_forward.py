from torch import Tensor, nn

from .. import ops
from ._projection import make_projection
from .config import LanguageModelConfig


class SwiGLU(nn.Module):
    """Feed-forward layer ``down(silu(gate(x)) · up(x))`` (arXiv:2002.05202)."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.feed_forward_width
        self.gate = make_projection(width, hidden, config.initializer_range)
        self.up = make_projection(width, hidden, config.initializer_range)
        self.down = make_projection(hidden, width, config.residual_range)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(ops.swiglu(self.gate(x), self.up(x)))
        return y
