"""``fla.ops.kda``: the functions over `fastweights.ops.kda`."""

import functools
import itertools
from collections.abc import Callable
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


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """`fastweights.ops.kda` called as fla's function is.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV, K], the log-decays; with `use_gate_in_kernel` what they are made of.
        beta: [B, T, HV]; with `use_beta_sigmoid_in_kernel` before the sigmoid.
        scale: of the output; 1/√K unless given.
        initial_state: [N, HV, K, V], or [N, HV, V, K].
        output_final_state: whether the state after the last token is wanted.
        use_qk_l2norm_in_kernel: whether q and k are normalised first.
        use_gate_in_kernel: the log-decay is ``−exp(A_log) · softplus(g + dt_bias)``, or with
            `lower_bound` it is ``lower_bound · σ(exp(A_log) · (g + dt_bias))``.
        use_beta_sigmoid_in_kernel: β = σ(beta).
        allow_neg_eigval: β = 2·σ(beta).
        safe_gate: no effect, but that with `use_gate_in_kernel` it needs `lower_bound`.
        lower_bound: see `use_gate_in_kernel`; no effect without it.
        disable_recompute: no effect.
        return_intermediate_states: whether the states before each chunk are wanted too.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1], borders of packed sequences.
        cu_seqlens_cpu: no effect.
        cp_context: must be None.
        use_graph: no effect.
        max_num_seqs: no effect.
        **kwargs: `A_log` [HV] and `dt_bias` [HV · K]. `chunk_size`, 64 unless given, which decides
            what `return_intermediate_states` gives and nothing else. `transpose_state_layout`, the
            former name of `state_v_first`.

    Returns:
        o [B, T, HV, V] of q's type, and the final state (None unless asked for). With
        `return_intermediate_states` also the states before each chunk of each sequence, [B, chunks,
        HV, K, V] of k's type.

    Raises:
        TypeError: an unknown keyword.
        ValueError: arguments that exclude or need each other.
        ShapeError: a tensor of another shape or type.
        NotImplementedError: a `cp_context`.
    """
    del disable_recompute, cu_seqlens_cpu, use_graph, max_num_seqs
    name = "chunk_kda"
    more = keywords(
        chunk_kda, kwargs, A_log=None, dt_bias=None, chunk_size=64, transpose_state_layout=None
    )
    refuse_context(name, cp_context)
    v_first = state_layout(name, state_v_first, more["transpose_state_layout"])
    if use_gate_in_kernel:
        if safe_gate and lower_bound is None:
            raise ValueError(f"{name}: safe_gate with use_gate_in_kernel needs lower_bound")
        g = log_decay(name, g, more["A_log"], more["dt_bias"], lower_bound)
    wanted, key_type = q.dtype, k.dtype
    q, k, v = of_one_type(q, k, v)
    beta = strength(name, q, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    rule = functools.partial(ops.kda, scale=scale, use_qk_l2norm=use_qk_l2norm_in_kernel)
    inputs = (q, k, v, gate_for(q, g), beta)
    state = initial(k_first(name, initial_state, q, v, v_first), q)
    packing = borders(cu_seqlens)
    if not return_intermediate_states:
        o, last = rule(
            *inputs,
            initial_state=state,
            output_final_state=output_final_state,
            cu_seqlens=packing,
        )
        return o.to(wanted), final(last, v_first)
    o, last, before = _chunk_by_chunk(rule, inputs, state, packing, more["chunk_size"])
    before = before.mT.contiguous() if v_first else before
    kept = final(last, v_first) if output_final_state else None
    return o.to(wanted), kept, before.to(key_type)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_kda`; `o` has v's type, and `beta` may be [B, T, HV, V]: one for each column."""
    name = "fused_recurrent_kda"
    more = keywords(fused_recurrent_kda, kwargs, transpose_state_layout=None)
    v_first = state_layout(name, state_v_first, more["transpose_state_layout"])
    if use_gate_in_kernel:
        g = log_decay(name, g, A_log, dt_bias, lower_bound)
    wanted = v.dtype
    q, k, v = of_one_type(q, k, v)
    o, state = gated_rule(
        q,
        k,
        v,
        strength(name, q, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        Gates(key=g),
        scale=scale,
        initial_state=initial(k_first(name, initial_state, q, v, v_first), q),
        output_final_state=output_final_state,
        cu_seqlens=borders(cu_seqlens),
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o.to(wanted), final(state, v_first)


def _chunk_by_chunk(
    rule: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state, and the states before the chunks of each sequence."""
    q, _, v, *_ = inputs
    places = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        rows = q.shape[0] if cu_seqlens is None else len(places) - 1
        fp32 = torch.promote_types(q.dtype, torch.float32)
        initial_state = v.new_zeros(rows, v.shape[2], q.shape[3], v.shape[3], dtype=fp32)
    outputs, last = [v[:, :0]], [initial_state[:0]]
    before = [initial_state.new_empty(q.shape[0], 0, *initial_state.shape[1:])]
    for n, (begin, end) in enumerate(itertools.pairwise(places)):
        state = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        for start in range(begin, end, chunk_size):
            before.append(state[:, None])
            part = slice(start, min(start + chunk_size, end))
            pieces = (x[:, part] for x in inputs)
            o, after = rule(*pieces, initial_state=state, output_final_state=True)
            assert after is not None
            state = after
            outputs.append(o)
        last.append(state)
    return torch.cat(outputs, 1), torch.cat(last), torch.cat(before, 1)
