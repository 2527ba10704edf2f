"""The functions of flash-linear-attention 0.6 over the operators of `fastweights.ops`.

Same names, arguments, defaults and results as in ``fla.ops`` (fla-org/flash-linear-attention,
package fla-core), so that a change of the import is enough::

    from fla.ops.kda import chunk_kda          # before
    from fastweights.fla.kda import chunk_kda  # after

Arguments that change a result do so here too. Those that only steer fla's kernels (``chunk_size``,
``chunk_indices``, ``cu_seqlens_cpu``, ``safe_gate``, ``disable_recompute``, ``use_graph``,
``max_num_seqs``) are accepted and have no effect; ``cp_context`` and unknown keywords are refused
by name. Every function has gradients for every input, those of the recurrent form included.
"""

from .delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from .gated_delta_product import chunk_gated_delta_product
from .gated_delta_rule import (
    chunk_gated_delta_rule,
    chunk_gdn,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
)
from .generalized_delta_rule import chunk_dplr_delta_rule, fused_recurrent_dplr_delta_rule
from .kda import chunk_kda, fused_recurrent_kda
from .rwkv7 import chunk_rwkv7, fused_mul_recurrent_rwkv7, fused_recurrent_rwkv7

__all__ = [
    "chunk_delta_rule",
    "chunk_dplr_delta_rule",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_kda",
    "chunk_rwkv7",
    "fused_mul_recurrent_rwkv7",
    "fused_recurrent_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_kda",
    "fused_recurrent_rwkv7",
]
