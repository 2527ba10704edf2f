"""``fla.ops.rwkv7``: RWKV-7's names for the functions of `generalized_delta_rule`."""

from torch import Tensor

from ._arguments import refuse_context
from .generalized_delta_rule import chunk_dplr_delta_rule, fused_recurrent_dplr_delta_rule


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: object = None,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_dplr_delta_rule` with r for q and the log-decay w for gk; the scale is 1.

    Args:
        r: [B, T, H, K].
        w: [B, T, HV, K], the log-decays.
        k: [B, T, H, K].
        v: [B, T, HV, V].
        a: [B, T, H, K], what is read.
        b: [B, T, H, K], where the read is written.
        scale: of the output.
        initial_state: [N, HV, K, V].
        output_final_state: whether the state after the last token is wanted.
        cu_seqlens: [N + 1], borders of packed sequences.
        cu_seqlens_cpu: no effect.
        safe_gate: no effect.
        chunk_size: no effect.
        disable_recompute: no effect.
        cp_context: must be None.
        lower_bound: a promise about `w`, without effect.

    Returns:
        o [B, T, HV, V] of r's type, and the final state (None unless asked for).

    Raises:
        ShapeError: a tensor of another shape or type.
        NotImplementedError: a `cp_context`.
    """
    del cu_seqlens_cpu, safe_gate, chunk_size, disable_recompute, lower_bound
    refuse_context("chunk_rwkv7", cp_context)
    return chunk_dplr_delta_rule(
        r,
        k,
        v,
        a,
        b,
        w,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_rwkv7`, but the scale is 1/√K unless given, and the final state is returned.

    So fla has it. `o` has v's type.
    """
    return fused_recurrent_dplr_delta_rule(
        r,
        k,
        v,
        a,
        b,
        w,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_rwkv7`, which is given −kk for a and kk ⊙ a for b; `o` has v's type.

    Args:
        r: [B, T, H, K].
        w: [B, T, HV, K], the log-decays.
        k: [B, T, H, K].
        v: [B, T, HV, V].
        kk: [B, T, H, K], the direction that is removed, of length 1.
        a: [B, T, H, K], how much of it.
        scale: of the output; None: 1/√K.
        initial_state: [N, HV, K, V].
        output_final_state: whether the state after the last token is wanted.
        reverse: whether to walk from the last token of each sequence back.
        cu_seqlens: [N + 1], borders of packed sequences.
    """
    return fused_recurrent_dplr_delta_rule(
        r,
        k,
        v,
        -kk,
        kk * a,
        w,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
    )
