"""Gradient steps that a session takes on a feed-forward layer (docs/end_to_end.md)."""

from typing import NamedTuple


class EndToEndOptions(NamedTuple):
    """Learning end to end: gradient steps on the last block's feed-forward.

    The session owns a ΔW of the gate and the up projection. After every few tokens it takes a step
    down the gradient of their next-token loss, a sum of outer products of the layer's input and the
    error that reaches its output, as in test-time training (arXiv:2512.23675). The model's weights
    stay as they are. The loss is that of the model's logits before a memory at the head or an exact
    store corrects them.
    """

    learning_rate: float = 1.0  # in [0, 1000]: of a step along the gradient of the mean loss, nats
    every: int = 32  # in [1, 4096]: tokens of a step, counted from the session's first
    clip: float = 1.0  # above 0: larger gradients are scaled down to this norm


__all__ = ["EndToEndOptions"]
