from torch import Tensor

from ._dispatch import operator
from ._vmap import register_vmap

_generalized_delta_rule = operator("generalized_delta_rule")
_generalized_delta_rule_recurrent_ = operator("generalized_delta_rule_recurrent_")
register_vmap("generalized_delta_rule", "generalized_delta_rule_backward")


def generalized_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Diagonal plus low rank: ``S ← Diag(exp(g)) S + b (Sᵀa)ᵀ + k vᵀ``.

    RWKV-7, arXiv:2503.14456; ``o = scale · Sᵀq``; Sᵀa reads the state before the token.

    Args:
        q: [B, T, H, K], K up to 256. T may be 0.
        k: [B, T, H, K].
        v: [B, T, HV, V], V up to 256, HV a multiple of H.
        a: [B, T, H, K], what is read.
        b: [B, T, H, K], where the read is written.
        g: [B, T, HV, K], the logarithm of each channel's decay, ≤ 0; −∞ forgets exactly.
        scale: of the output; 1/√K unless given.
        initial_state: [B, HV, K, V], zero unless given; it is not changed.
        output_final_state: whether the state after the last token is wanted.
        cu_seqlens: int64 [N + 1], the borders of N sequences, empty ones included, that lie one
            after the other in a batch of one. States are then [N, HV, K, V].
        use_qk_l2norm: replaces each q and k by ``x · rsqrt(Σx² + 1e-6)``.

    Returns:
        o [B, T, HV, V] of v's type, and the final state (None unless asked for).

    Raises:
        ShapeError: naming the tensor, what it must be and what it is.
    """
    o, state = _generalized_delta_rule(
        q, k, v, a, b, g, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm
    )
    return o, state if output_final_state else None


def generalized_delta_rule_recurrent_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> Tensor:
    """`generalized_delta_rule` token by token, writing into `state` [B, HV, K, V]: to decode.

    Without gradients. Returns o [B, T, HV, V].
    """
    o: Tensor = _generalized_delta_rule_recurrent_(q, k, v, a, b, g, state, scale, use_qk_l2norm)
    return o
