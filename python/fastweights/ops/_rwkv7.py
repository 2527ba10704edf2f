from torch import Tensor

from ._generalized_delta_rule import generalized_delta_rule, generalized_delta_rule_recurrent_


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`generalized_delta_rule` by RWKV-7's names: ``S ← Diag(exp(w)) S + b (Sᵀa)ᵀ + k vᵀ``.

    Peng et al., arXiv:2503.14456; ``o = scale · Sᵀr``. The caller forms a = −κ̂, b = κ̂ ⊙ η and the
    written key k ⊙ (1 + (η − 1) ⊙ k_a).

    Args:
        r: [B, T, H, K], K up to 256. T may be 0.
        w: [B, T, HV, K], the logarithm of each channel's decay, ≤ 0.
        k: [B, T, H, K].
        v: [B, T, HV, V], V up to 256, HV a multiple of H.
        a: [B, T, H, K], what is read.
        b: [B, T, H, K], where the read is written.
        scale: of the output; 1 unless given.
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
    return generalized_delta_rule(
        r,
        k,
        v,
        a,
        b,
        w,
        1.0 if scale is None else scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm,
    )


def rwkv7_recurrent_(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> Tensor:
    """`rwkv7` token by token, writing into `state` [B, HV, K, V]: the way to decode.

    Without gradients. Returns o [B, T, HV, V].
    """
    return generalized_delta_rule_recurrent_(
        r, k, v, a, b, w, state, 1.0 if scale is None else scale, use_qk_l2norm
    )
