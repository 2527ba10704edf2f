import torch
from torch import Tensor

from ..errors import ShapeError
from ._gated_delta_rule import gated_delta_rule, gated_delta_rule_recurrent_


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
    queries, gates = _steps(q, k, v, g, beta, num_householder)
    o, state = gated_delta_rule(
        queries,
        k,
        v,
        gates,
        beta,
        scale,
        initial_state,
        output_final_state,
        None if cu_seqlens is None else cu_seqlens * num_householder,
        use_qk_l2norm,
    )
    return _last_steps(o, num_householder), state


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
    queries, gates = _steps(q, k, v, g, beta, num_householder)
    o = gated_delta_rule_recurrent_(queries, k, v, gates, beta, state, scale, use_qk_l2norm)
    return _last_steps(o, num_householder)


def _spread(tokens: Tensor, writes: int, at: int) -> Tensor:
    """[B, T, …] → [B, T · writes, …], zero but for step `at` of each token."""
    steps = [torch.zeros_like(tokens)] * writes
    steps[at] = tokens
    return torch.stack(steps, 2).flatten(1, 2)


def _steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, writes: int
) -> tuple[Tensor, Tensor]:
    """Q and g of the steps: the state decays at a token's first and is read after its last."""
    if writes < 1:
        raise ShapeError(f"gated_delta_product: num_householder must be at least 1, got {writes}")
    if q.dim() != 4:
        raise ShapeError(f"gated_delta_product: q must be [B, T, H, K], got {list(q.shape)}")
    tokens = q.shape[1]
    for name, tensor in (("k", k), ("v", v), ("beta", beta)):
        if tensor.dim() < 2 or tensor.shape[1] != tokens * writes:
            raise ShapeError(
                f"gated_delta_product: {name} must have T · num_householder = {tokens} · {writes} "
                f"rows, got {list(tensor.shape)}"
            )
    if g is not None and (g.dim() != 3 or g.shape[1] != tokens):
        raise ShapeError(
            f"gated_delta_product: g must be [B, T, HV] with T = {tokens}, got {list(g.shape)}"
        )
    gates = torch.zeros_like(beta) if g is None else _spread(g, writes, 0)
    return _spread(q, writes, writes - 1), gates


def _last_steps(o: Tensor, writes: int) -> Tensor:
    """The rows of each token's last step."""
    batch, steps = o.shape[:2]
    return o.reshape(batch, steps // writes, writes, *o.shape[2:])[:, :, -1]
