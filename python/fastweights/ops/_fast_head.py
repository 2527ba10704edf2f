from torch import Tensor

from ._dispatch import operator

_fast_head = operator("fast_head")


def fast_head(
    h: Tensor,
    logits: Tensor,
    tokens: Tensor,
    state: Tensor,
    hidden: Tensor,
    pending: Tensor,
    *,
    eta: float = 0.3,
    g: float = 0.0,
    strength: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The memory at the head of a language model: `softmax_delta_rule` over a text in pieces.

    What predicts the next token is written when that token is known; until then the last hidden
    state and its corrected logits are part of the state. Zeros are a fresh state.

    Args:
        h: [B, T, D], the hidden states from which the logits are made. T may be 0.
        logits: [B, T, N], of h's type or fp32.
        tokens: int64 [B, T], the tokens that were read.
        state: [B, D, N], fp32 (fp64 for a fp64 `hidden`).
        hidden: [B, D], the last hidden state of the piece before.
        pending: [B, N], its corrected logits.
        eta: write strength, up to 2.
        g: log-decay of a token, at most 0.
        strength: fp32 [B, T], how strongly each token is learned (1 without it): eta is multiplied
            by it and limited to 2, g is multiplied by it up to 1.
        in_place: inference only: the states given are overwritten and returned.

    Returns:
        The corrected logits [B, T, N], the state, the last hidden state, its corrected logits.

    Raises:
        ShapeError: naming the tensor, what it must be and what it is.
    """
    corrected, state, hidden, pending = _fast_head(
        h, logits, tokens, state, hidden, pending, eta, g, strength, in_place
    )
    return corrected, state, hidden, pending
