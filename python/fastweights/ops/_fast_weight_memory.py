from torch import Tensor

from ._dispatch import operator

_fast_weight_memory = operator("fast_weight_memory")


def fast_weight_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    gate: Tensor,
    convolution_weight: Tensor,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    state: Tensor | None = None,
    conv: Tensor | None = None,
    *,
    heads: int,
    value_heads: int,
    beta_max: float = 1.0,
    rule: str = "gated_delta_rule",
    eps: float = 1e-6,
    in_place: bool = False,
    write_strength: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All of a fast-weight memory layer that lies between its projections.

    Short convolution, L2-normalised queries and keys, ``β = beta_max · σ(beta)``, ``g = −exp(a_log)
    · softplus(decay + dt_bias)`` (arXiv:2412.06464), the rule, and a norm per head with an output
    gate.

    Args:
        query: [B, T, H·K], projected.
        key: [B, T, H·K].
        value: [B, T, HV·V].
        beta: [B, T, HV], before the sigmoid.
        decay: [B, T, HV], before the softplus; not used by "delta_rule".
        gate: [B, T, HV·V], before the SiLU.
        convolution_weight: [2·H·K + HV·V, W], for queries, keys and values in this order.
        a_log: [HV]; not used by "delta_rule".
        dt_bias: [HV]; not used by "delta_rule".
        norm_weight: [V].
        state: [B, HV, K, V], zero unless given.
        conv: [B, W − 1, 2·H·K + HV·V], the convolution's state, zero unless given.
        heads: H.
        value_heads: HV, a multiple of H.
        beta_max: the largest write strength, up to 2.
        rule: "gated_delta_rule" or "delta_rule".
        eps: of the norm.
        in_place: inference only: `state` may be overwritten.
        write_strength: fp32 [B, T], each r in [0, 2]: how strongly each token is learned. β is
            multiplied by r and limited to 2, g is multiplied by min(r, 1): with 1 (or None) a token
            is learned as trained, with 0 it leaves the fast weights as they are.

    Returns:
        o [B, T, HV·V], and both states after the last token.
    """
    o, next_state, next_conv = _fast_weight_memory(
        query,
        key,
        value,
        beta,
        decay,
        gate,
        convolution_weight,
        a_log,
        dt_bias,
        norm_weight,
        state,
        conv,
        heads,
        value_heads,
        beta_max,
        rule,
        eps,
        in_place,
        write_strength,
    )
    return o, next_state, next_conv
