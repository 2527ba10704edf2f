"""``fla.ops.gated_delta_rule``: the functions over `fastweights.ops.gated_delta_rule`."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._arguments import (
    borders,
    final,
    gate_for,
    initial,
    k_first,
    keywords,
    log_decay,
    of_one_type,
    refuse_context,
    state_layout,
    strength,
)
from ._gates import Gates, gated_rule


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fastweights.ops.gated_delta_rule` called as fla's function is.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV], the log-decay; with `use_gate_in_kernel` what it is made of.
        beta: [B, T, HV]; with `use_beta_sigmoid_in_kernel` before the sigmoid.
        scale: of the output; 1/√K unless given.
        initial_state: [N, HV, K, V], or [N, HV, V, K].
        output_final_state: whether the state after the last token is wanted.
        use_qk_l2norm_in_kernel: whether q and k are normalised first.
        use_beta_sigmoid_in_kernel: β = σ(beta).
        allow_neg_eigval: β = 2·σ(beta).
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1], borders of packed sequences.
        cu_seqlens_cpu: no effect.
        chunk_indices: no effect.
        cp_context: must be None.
        **kwargs: `use_gate_in_kernel` with `A_log` [HV] and `dt_bias` [HV]: the log-decay is
            ``−exp(A_log) · softplus(g + dt_bias)``. `chunk_size`, without effect.
            `transpose_state_layout`, the former name of `state_v_first`.

    Returns:
        o [B, T, HV, V] of q's type, and the final state (None unless asked for).

    Raises:
        TypeError: an unknown keyword.
        ValueError: arguments that exclude each other.
        ShapeError: a tensor of another shape or type.
        NotImplementedError: a `cp_context`.
    """
    del cu_seqlens_cpu, chunk_indices
    name = "chunk_gated_delta_rule"
    more = keywords(
        chunk_gated_delta_rule,
        kwargs,
        use_gate_in_kernel=False,
        A_log=None,
        dt_bias=None,
        chunk_size=64,
        transpose_state_layout=None,
    )
    refuse_context(name, cp_context)
    v_first = state_layout(name, state_v_first, more["transpose_state_layout"])
    if more["use_gate_in_kernel"]:
        g = log_decay(name, g, more["A_log"], more["dt_bias"])
    wanted = q.dtype
    q, k, v = of_one_type(q, k, v)
    o, state = ops.gated_delta_rule(
        q,
        k,
        v,
        gate_for(q, g),
        strength(name, q, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        scale=scale,
        initial_state=initial(k_first(name, initial_state, q, v, v_first), q),
        output_final_state=output_final_state,
        cu_seqlens=borders(cu_seqlens),
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o.to(wanted), final(state, v_first)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_gated_delta_rule`, with further gates, each of which may be missing.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV], a log-decay for each head.
        gk: [B, T, HV, K], a log-decay for each channel of the key: each row of the state.
        gv: [B, T, HV, V], a log-decay for each channel of the value: each column.
        beta: [B, T, HV], or [B, T, HV, V]: one for each column; 1 unless given.
        scale: of the output; 1/√K unless given.
        initial_state: [N, HV, K, V], or [N, HV, V, K].
        output_final_state: whether the state after the last token is wanted.
        use_qk_l2norm_in_kernel: whether q and k are normalised first.
        use_gate_in_kernel: the log-decay is ``−exp(A_log) · softplus(g + dt_bias)``.
        A_log: [HV].
        dt_bias: [HV].
        use_beta_sigmoid_in_kernel: β = σ(beta).
        allow_neg_eigval: β = 2·σ(beta).
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1], borders of packed sequences.
        **kwargs: `transpose_state_layout`, the former name of `state_v_first`.

    Returns:
        o [B, T, HV, V] of v's type, and the final state (None unless asked for).

    Raises:
        TypeError: an unknown keyword.
        ValueError: arguments that exclude or need each other.
        ShapeError: a tensor of another shape or type.
    """
    name = "fused_recurrent_gated_delta_rule"
    more = keywords(fused_recurrent_gated_delta_rule, kwargs, transpose_state_layout=None)
    v_first = state_layout(name, state_v_first, more["transpose_state_layout"])
    if use_gate_in_kernel:
        if g is None:
            raise ValueError(f"{name}: use_gate_in_kernel needs g, got None")
        g = log_decay(name, g, A_log, dt_bias)
    wanted = v.dtype
    q, k, v = of_one_type(q, k, v)
    if beta is None:
        beta = torch.ones_like(v[..., 0])
    beta = strength(name, q, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    o, state = gated_rule(
        q,
        k,
        v,
        beta,
        Gates(g, gk, gv),
        scale=scale,
        initial_state=initial(k_first(name, initial_state, q, v, v_first), q),
        output_final_state=output_final_state,
        cu_seqlens=borders(cu_seqlens),
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o.to(wanted), final(state, v_first)


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
