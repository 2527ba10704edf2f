from torch import Tensor

from ._dispatch import operator
from ._vmap import register_vmap

_kda = operator("kda")
_kda_recurrent_ = operator("kda_recurrent_")
register_vmap("kda", "kda_backward")


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention: ``S ← Diag(exp(g)) S``, then ``S ← S + β k (v − Sᵀk)ᵀ``.

    Kimi team, "Kimi Linear", arXiv:2510.26692; ``o = scale · Sᵀq``.

    Args:
        q: [B, T, H, K], K up to 256. T may be 0.
        k: [B, T, H, K].
        v: [B, T, HV, V], V up to 256, HV a multiple of H.
        g: [B, T, HV, K], the logarithm of each channel's decay, ≤ 0; −∞ forgets exactly.
        beta: [B, T, HV], the write strengths, 0 to 2.
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
    o, state = _kda(
        q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm
    )
    return o, state if output_final_state else None


def kda_recurrent_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> Tensor:
    """`kda` token by token, writing into `state` [B, HV, K, V]: the way to decode.

    Without gradients. Returns o [B, T, HV, V].
    """
    o: Tensor = _kda_recurrent_(q, k, v, g, beta, state, scale, use_qk_l2norm)
    return o
