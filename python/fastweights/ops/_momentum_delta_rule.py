from torch import Tensor

from ._dispatch import operator
from ._vmap import register_vmap

_momentum_delta_rule = operator("momentum_delta_rule")
_momentum_delta_rule_recurrent_ = operator("momentum_delta_rule_recurrent_")
register_vmap("momentum_delta_rule", "momentum_delta_rule_backward")


def momentum_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    mu: Tensor,
    eta: Tensor,
    p: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The delta rule with momentum: ``M ← μ M + η k (v − Sᵀp)ᵀ``, ``S ← exp(g) S + β M``.

    The linear memory of Titans, Behrouz et al., arXiv:2501.00663; ``o = scale · Sᵀq``.

    Args:
        q: [B, T, H, K], K up to 256. T may be 0.
        k: [B, T, H, K].
        v: [B, T, HV, V], V up to 256, HV a multiple of H.
        g: [B, T, HV], the logarithm of the decay, ≤ 0; −∞ forgets exactly.
        beta: [B, T, HV], how much of the momentum the state takes, 0 to 1.
        mu: [B, T, HV], how much of the momentum stays, 0 to 1.
        eta: [B, T, HV], the write strengths, 0 to 1.
        p: [B, T, H, K], what is read to find the error; k unless given (under `use_qk_l2norm` the
            normalised k). A given p is not normalised.
        scale: of the output; 1/√K unless given.
        initial_state: the pair (S, M), each [B, HV, K, V]; zero unless given, not changed.
        output_final_state: whether the pair after the last token is wanted.
        cu_seqlens: int64 [N + 1], the borders of N sequences, empty ones included, that lie one
            after the other in a batch of one. States are then [N, HV, K, V].
        use_qk_l2norm: replaces each q and k by ``x · rsqrt(Σx² + 1e-6)``.

    Returns:
        o [B, T, HV, V] of v's type, and the final pair (S, M) (None unless asked for).

    Raises:
        ShapeError: naming the tensor, what it must be and what it is.
    """
    state, momentum = (None, None) if initial_state is None else initial_state
    o, state, momentum = _momentum_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        mu,
        eta,
        p,
        scale,
        state,
        momentum,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm,
    )
    return o, (state, momentum) if output_final_state else None


def momentum_delta_rule_recurrent_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    mu: Tensor,
    eta: Tensor,
    state: tuple[Tensor, Tensor],
    p: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> Tensor:
    """`momentum_delta_rule` token by token, writing into both of `state`: the way to decode.

    Without gradients. Returns o [B, T, HV, V].
    """
    o: Tensor = _momentum_delta_rule_recurrent_(
        q, k, v, g, beta, mu, eta, p, *state, scale, use_qk_l2norm
    )
    return o
