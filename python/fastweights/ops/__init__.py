"""Differentiable operators: the rules, and what the layers are made of.

Layouts are those of flash-linear-attention: ``q``, ``k``: [B, T, H, K]; ``v`` and the output:
[B, T, HV, V] with HV a multiple of H (value head j reads key head j // (HV / H)); ``beta`` and
``g``: [B, T, HV]; states: [B, HV, K, V]. q, k and v share one of bf16, fp16, fp32 and fp64; beta
and g have that type or fp32; the state is fp32 (fp64 with fp64 inputs), or bf16 where it is given
so: it is widened for the call and rounded at its end, and the final state is bf16 too.

The same operators are registered as ``torch.ops.fastweights.*``. Called from here they raise the
errors of `fastweights.errors`; called as ``torch.ops``, PyTorch makes each a RuntimeError.
"""

from ._delta_rule import delta_rule, delta_rule_recurrent_
from ._fast_head import fast_head
from ._fast_weight_memory import fast_weight_memory
from ._gated_delta_product import gated_delta_product, gated_delta_product_recurrent_
from ._gated_delta_rule import gated_delta_rule, gated_delta_rule_recurrent_
from ._generalized_delta_rule import generalized_delta_rule, generalized_delta_rule_recurrent_
from ._kda import kda, kda_recurrent_
from ._linear_attention import linear_attention, linear_attention_recurrent_
from ._momentum_delta_rule import momentum_delta_rule, momentum_delta_rule_recurrent_
from ._normalization import gated_rms_norm, rms_norm, swiglu
from ._rwkv7 import rwkv7, rwkv7_recurrent_
from ._short_convolution import short_convolution
from ._sliding_window_attention import sliding_window_attention
from ._softmax_delta_rule import softmax_delta_rule, softmax_delta_rule_recurrent_

__all__ = [
    "delta_rule",
    "delta_rule_recurrent_",
    "fast_head",
    "fast_weight_memory",
    "gated_delta_product",
    "gated_delta_product_recurrent_",
    "gated_delta_rule",
    "gated_delta_rule_recurrent_",
    "gated_rms_norm",
    "generalized_delta_rule",
    "generalized_delta_rule_recurrent_",
    "kda",
    "kda_recurrent_",
    "linear_attention",
    "linear_attention_recurrent_",
    "momentum_delta_rule",
    "momentum_delta_rule_recurrent_",
    "rms_norm",
    "rwkv7",
    "rwkv7_recurrent_",
    "short_convolution",
    "sliding_window_attention",
    "softmax_delta_rule",
    "softmax_delta_rule_recurrent_",
    "swiglu",
]
