from torch import Tensor

from ._dispatch import operator

_gated_delta_product = operator("gated_delta_product")
_gated_delta_product_recurrent_ = operator("gated_delta_product_recurrent_")


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """DeltaProduct: ``S ← exp(g) S`` once, then n delta writes a token.

    Siems et al., arXiv:2502.10297; ``o = scale · Sᵀq`` after the last write. Runs as
    `gated_delta_rule` on n steps a token.

    Args:
        q: [B, T, H, K], K up to 256. T may be 0.
        k: [B, T · n, H, K]; row t · n + j is write j of token t.
        v: [B, T · n, HV, V], V up to 256, HV a multiple of H.
        g: [B, T, HV], the logarithm of the decay, ≤ 0; None: nothing decays.
        beta: [B, T · n, HV], the write strengths, 0 to 2.
        num_householder: n, the writes of a token, at least 1.
        scale: of the output; 1/√K unless given.
        initial_state: [B, HV, K, V], zero unless given; it is not changed.
        output_final_state: whether the state after the last token is wanted.
        cu_seqlens: int64 [N + 1], the borders of N sequences, empty ones included, that lie one
            after the other in a batch of one, counted in tokens. States are then [N, HV, K, V].
        use_qk_l2norm: replaces each q and k by ``x · rsqrt(Σx² + 1e-6)``.

    Returns:
        o [B, T, HV, V] of v's type, and the final state (None unless asked for).

    Raises:
        ShapeError: naming the tensor, what it must be and what it is.
    """
    o, state = _gated_delta_product(
        q,
        k,
        v,
        g,
        beta,
        num_householder,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm,
    )
    return o, state if output_final_state else None


def gated_delta_product_recurrent_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    num_householder: int,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> Tensor:
    """`gated_delta_product` token by token, writing into `state` [B, HV, K, V]: the way to decode.

    Without gradients. Returns o [B, T, HV, V].
    """
    o: Tensor = _gated_delta_product_recurrent_(
        q, k, v, g, beta, state, num_householder, scale, use_qk_l2norm
    )
    return o
