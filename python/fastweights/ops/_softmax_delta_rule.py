import torch
from torch import Tensor

from ._dispatch import operator
from ._vmap import register_vmap

_softmax_delta_rule = operator("softmax_delta_rule")
_softmax_delta_rule_recurrent_ = operator("softmax_delta_rule_recurrent_")
register_vmap("softmax_delta_rule", "softmax_delta_rule_backward")


def softmax_delta_rule(
    h: Tensor,
    logits: Tensor,
    target: Tensor,
    eta: Tensor | float,
    g: Tensor | float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    pending: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule at the head of a language model: its value is the token that comes next.

    ``logits′ = logits + Fᵀĥ``, then
    ``F ← exp(g) F + eta · ĥ (onehot(target) − softmax(logits′))ᵀ``, token by token, with
    ``ĥ = h · rsqrt(Σh² + 1e-6)``.

    Args:
        h: [B, T, D], the hidden states that predict the tokens. T may be 0.
        logits: [B, T, N], of h's type or fp32; N is the vocabulary.
        target: int64 [B, T], the tokens that came, below N. Where it is negative it is not known,
            and the state stays as it is.
        eta: [B, T] of h's type or fp32, or a number: the write strengths, 0 to 4.
        g: [B, T] of h's type or fp32, or a number: the log-decay, at most 0; −inf forgets
            everything that was written before the token. None: no decay.
        initial_state: [B, D, N], zero unless given; it is not changed.
        output_final_state: whether the state after the last token is wanted.
        pending: token 0 is the last one of an earlier call: its logits are corrected already, and
            it only writes, now that its target is known. So a sequence can be read in pieces.

    Returns:
        logits′ [B, T, N] of the logits' type, and the final state [B, D, N], fp32 (fp64 for fp64
        h; None unless asked for).

    Raises:
        ShapeError: naming the tensor, what it must be and what it is.
    """
    corrected, state = _softmax_delta_rule(
        h,
        logits,
        target,
        _per_token(eta, h),
        None if g is None else _per_token(g, h),
        initial_state,
        output_final_state,
        pending,
    )
    return corrected, state if output_final_state else None


def softmax_delta_rule_recurrent_(
    h: Tensor,
    logits: Tensor,
    target: Tensor,
    eta: Tensor | float,
    g: Tensor | float | None,
    state: Tensor,
    pending: bool = False,
) -> Tensor:
    """`softmax_delta_rule`, writing into `state` [B, D, N]: the way to decode.

    Without gradients. Returns logits′ [B, T, N].
    """
    corrected: Tensor = _softmax_delta_rule_recurrent_(
        h,
        logits,
        target,
        _per_token(eta, h),
        None if g is None else _per_token(g, h),
        state,
        pending,
    )
    return corrected


def _per_token(value: Tensor | float, h: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return torch.full(h.shape[:2], value, dtype=dtype, device=h.device)
