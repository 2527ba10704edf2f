"""``fla.ops.delta_rule``: the functions over `fastweights.ops.delta_rule`."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._arguments import borders, gate_for, initial, keywords, of_one_type
from ._gates import Gates, gated_rule


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fastweights.ops.delta_rule` called as fla's function is.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V].
        beta: [B, T, HV].
        scale: of the output; 1/√K unless given.
        initial_state: [N, HV, K, V].
        output_final_state: whether the state after the last token is wanted.
        use_qk_l2norm_in_kernel: whether q and k are normalised first.
        cu_seqlens: [N + 1], borders of packed sequences.
        cu_seqlens_cpu: no effect.
        **kwargs: `chunk_size`, without effect.

    Returns:
        o [B, T, HV, V] of q's type, and the final state (None unless asked for).

    Raises:
        TypeError: an unknown keyword.
        ShapeError: a tensor of another shape or type.
    """
    del cu_seqlens_cpu
    keywords(chunk_delta_rule, kwargs, chunk_size=64)
    wanted = q.dtype
    q, k, v = of_one_type(q, k, v)
    o, state = ops.delta_rule(
        q,
        k,
        v,
        gate_for(q, beta),
        scale=scale,
        initial_state=initial(initial_state, q),
        output_final_state=output_final_state,
        cu_seqlens=borders(cu_seqlens),
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o.to(wanted), state


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_delta_rule`; `beta` may be missing (1), or [B, T, HV, V]: one for each column."""
    wanted = q.dtype
    q, k, v = of_one_type(q, k, v)
    o, state = gated_rule(
        q,
        k,
        v,
        torch.ones_like(v[..., 0]) if beta is None else gate_for(q, beta),
        Gates(),
        scale=scale,
        initial_state=initial(initial_state, q),
        output_final_state=output_final_state,
        cu_seqlens=borders(cu_seqlens),
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o.to(wanted), state
