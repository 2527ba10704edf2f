"""``fla.ops.generalized_delta_rule``: over `fastweights.ops.generalized_delta_rule`."""

from typing import Any

from torch import Tensor

from .. import ops
from ._arguments import (
    backwards,
    borders,
    gate_for,
    initial,
    keywords,
    of_one_type,
    refuse_context,
)


def chunk_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: object = None,
    lower_bound: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fastweights.ops.generalized_delta_rule` called as fla's function is.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V].
        a: [B, T, H, K], what is read.
        b: [B, T, H, K], where the read is written.
        gk: [B, T, HV, K], the log-decays.
        scale: of the output; 1/√K unless given.
        initial_state: [N, HV, K, V].
        output_final_state: whether the state after the last token is wanted.
        cu_seqlens: [N + 1], borders of packed sequences.
        cu_seqlens_cpu: no effect.
        safe_gate: no effect.
        chunk_size: no effect.
        disable_recompute: no effect.
        cp_context: must be None.
        lower_bound: a promise about `gk`, without effect.
        **kwargs: refused.

    Returns:
        o [B, T, HV, V] of q's type, and the final state (None unless asked for).

    Raises:
        TypeError: an unknown keyword.
        ShapeError: a tensor of another shape or type.
        NotImplementedError: a `cp_context`.
    """
    del cu_seqlens_cpu, safe_gate, chunk_size, disable_recompute, lower_bound
    keywords(chunk_dplr_delta_rule, kwargs)
    refuse_context("chunk_dplr_delta_rule", cp_context)
    o, state = _dplr(
        (q, k, v, a, b, gk),
        scale,
        initial_state,
        output_final_state,
        borders(cu_seqlens),
    )
    return o.to(q.dtype), state


def fused_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_dplr_delta_rule`; `o` has v's type; `reverse` walks from the last token back."""
    inputs: tuple[Tensor, ...] = (q, k, v, a, b, gk)
    packing = borders(cu_seqlens)
    order = backwards(q, packing) if reverse else None
    if order is not None:
        inputs = tuple(x.index_select(1, order) for x in inputs)
    o, state = _dplr(
        inputs,
        scale,
        initial_state,
        output_final_state,
        packing,
    )
    if order is not None:
        o = o.index_select(1, order)
    return o.to(v.dtype), state


def _dplr(
    inputs: tuple[Tensor, ...],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    q, k, v, a, b = of_one_type(*inputs[:5])
    return ops.generalized_delta_rule(
        q,
        k,
        v,
        a,
        b,
        gate_for(q, inputs[5]),
        scale=scale,
        initial_state=initial(initial_state, q),
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )
