"""``fla.ops.gated_delta_product``: the function over `fastweights.ops.gated_delta_product`."""

from torch import Tensor

from .. import ops
from ._arguments import borders, gate_for, initial, of_one_type, refuse_context


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object = None,
) -> tuple[Tensor, Tensor | None]:
    """`fastweights.ops.gated_delta_product` called as fla's function is.

    Args:
        q: [B, T, H, K].
        k: [B, T · n, H, K]; row t · n + j is write j of token t.
        v: [B, T · n, HV, V].
        g: [B, T, HV], the log-decay; None: nothing decays.
        beta: [B, T · n, HV].
        num_householder: n, the writes of a token.
        scale: of the output; 1/√K unless given.
        initial_state: [N, HV, K, V].
        output_final_state: whether the state after the last token is wanted.
        use_qk_l2norm_in_kernel: whether q and k are normalised first.
        cu_seqlens: [N + 1], borders of packed sequences, counted in tokens.
        cu_seqlens_cpu: no effect.
        cp_context: must be None.

    Returns:
        o [B, T, HV, V] of q's type, and the final state (None unless asked for).

    Raises:
        ShapeError: a tensor of another shape or type.
        NotImplementedError: a `cp_context`.
    """
    del cu_seqlens_cpu
    refuse_context("chunk_gated_delta_product", cp_context)
    wanted = q.dtype
    q, k, v = of_one_type(q, k, v)
    o, state = ops.gated_delta_product(
        q,
        k,
        v,
        None if g is None else gate_for(q, g),
        gate_for(q, beta),
        num_householder,
        scale=scale,
        initial_state=initial(initial_state, q),
        output_final_state=output_final_state,
        cu_seqlens=borders(cu_seqlens),
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return o.to(wanted), state
