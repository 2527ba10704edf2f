"""The delta rule with the gates that fla's recurrent kernel knows."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import ops
from ._arguments import gate_for


@dataclass(frozen=True)
class Gates:
    """Log-decays, each of which may be missing.

    Attributes:
        head: [B, T, HV].
        key: [B, T, HV, K], for each row of the state.
        value: [B, T, HV, V], for each column of the state.
    """

    head: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


def gated_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gates: Gates, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The delta rule under `gates`; `beta` is [B, T, HV], or [B, T, HV, V]: one for each column."""
    if gates.value is not None or beta.dim() == v.dim():
        return _by_column(q, k, v, beta, gates, options)
    if gates.key is not None:
        decay = gates.key if gates.head is None else gates.key + gates.head[..., None]
        return ops.kda(q, k, v, gate_for(q, decay), beta, **options)
    if gates.head is not None:
        return ops.gated_delta_rule(q, k, v, gate_for(q, gates.head), beta, **options)
    return ops.delta_rule(q, k, v, beta, **options)


def _by_column(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gates: Gates, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Each column of the state as a head with one value: no column depends on another."""
    heads, columns = v.shape[2:]

    def for_columns(x: Tensor) -> Tensor:  # [B, T, HV, ...] to [B, T, HV * V, ...]
        return x.repeat_interleave(columns, dim=2)

    head = None if gates.head is None else for_columns(gates.head)
    if gates.value is not None:
        value = gates.value.flatten(2)
        head = value if head is None else value + head
    state = options["initial_state"]
    if state is not None:
        state = state.mT.flatten(1, 2)[..., None]
    o, state = gated_rule(
        q,
        k,
        v.flatten(2)[..., None],
        beta.flatten(2) if beta.dim() == v.dim() else for_columns(beta),
        Gates(head, None if gates.key is None else for_columns(gates.key)),
        **options | {"initial_state": state},
    )
    if state is not None:
        state = state.reshape(-1, heads, columns, q.shape[3]).mT.contiguous()
    return o.reshape(v.shape), state
