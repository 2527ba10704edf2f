from torch import Tensor

from ._dispatch import operator

_short_convolution = operator("short_convolution")


def short_convolution(
    x: Tensor, weight: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time, then SiLU.

    Args:
        x: [B, T, D], T may be 0.
        weight: [D, W]; column W − 1 multiplies the current token.
        initial_state: [B, W − 1, D], the inputs before the first token, oldest first; zero unless
            given.

    Returns:
        y [B, T, D], and the state after the last token [B, W − 1, D].
    """
    y, state = _short_convolution(x, weight, initial_state)
    return y, state
