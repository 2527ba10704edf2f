#pragma once

#include <functional>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace fastweights {

/// Sizes and constants of `fast_weight_memory`.
struct FastWeightMemoryParams {
  int64_t heads = 1;                           ///< H, key heads
  int64_t value_heads = 1;                     ///< HV, a multiple of H
  double beta_max = 1.0;                       ///< β lies in (0, beta_max); up to 2
  std::string_view rule = "gated_delta_rule";  ///< or "delta_rule", which has no decay
  double eps = 1e-6;                           ///< of the per-head norm
  bool in_place = false;  ///< inference only: the states given may be overwritten
};

/// How strongly each token is learned: with strength r in [0, 2], β is multiplied by r and limited
/// to 2, up to which a write is stable, and g is multiplied by min(r, 1). With r = 1 a token is
/// learned as trained, to the bit; with r = 0 it leaves the fast weights as they are, to the bit.
struct WriteStrength {
  at::Tensor strength = {};  ///< fp32 [B, T]; undefined: 1
  at::Tensor limited = {};  ///< int64 [1]: the number of β that were limited is added; or undefined
};

/// What the rule of a memory layer reads.
struct MemoryRuleCall {
  at::Tensor q, k;   ///< [B, T, H, K], convolved; the rule makes their length one
  at::Tensor v;      ///< [B, T, HV, V]
  at::Tensor g;      ///< log-decay [B, T, HV]; undefined where the rule has none
  at::Tensor beta;   ///< [B, T, HV]
  at::Tensor state;  ///< [B, HV, K, V], not to be written into
};

/// Another rule in place of the layer's own, for inference: returns o [B, T, HV, V], of any type,
/// and the state after the last token.
using MemoryRule = std::function<std::tuple<at::Tensor, at::Tensor>(const MemoryRuleCall&)>;

/// Everything in a fast-weight memory layer that lies between its projections: short convolution
/// over queries, keys and values, L2-normalised queries and keys, write strength `β = beta_max ·
/// σ(beta)`, log-decay `g = −exp(a_log) · softplus(decay + dt_bias)` (Mamba-2, arXiv:2405.21060;
/// Gated DeltaNet, arXiv:2412.06464), the rule, then a norm per head with an output gate. Gates and
/// state are fp32 whatever the inputs are (fp64 for fp64 inputs).
/// @param query, key         [B, T, H·K], projected
/// @param value, gate        [B, T, HV·V], projected
/// @param beta               [B, T, HV], before the sigmoid
/// @param decay              [B, T, HV], before the softplus; not needed by "delta_rule"
/// @param convolution_weight [2·H·K + HV·V, W], for queries, keys and values in this order
/// @param a_log, dt_bias     [HV]; not needed by "delta_rule"
/// @param norm_weight        [V]
/// @param state              [B, HV, K, V], zero unless given
/// @param convolution_state  [B, W − 1, 2·H·K + HV·V], zero unless given
/// @param write              strengths of the writes; their values are not checked
/// @param rule               runs in place of the rule that `params` names; empty: that
/// @return o [B, T, HV·V], the state and the convolution's state after the last token
/// @throws ShapeError naming the tensor, the expected and the given shape
std::tuple<at::Tensor, at::Tensor, at::Tensor> fast_weight_memory(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& beta,
    const std::optional<at::Tensor>& decay, const at::Tensor& gate,
    const at::Tensor& convolution_weight, const std::optional<at::Tensor>& a_log,
    const std::optional<at::Tensor>& dt_bias, const at::Tensor& norm_weight,
    const std::optional<at::Tensor>& state, const std::optional<at::Tensor>& convolution_state,
    const FastWeightMemoryParams& params, const WriteStrength& write = {},
    const MemoryRule& rule = {});

}  // namespace fastweights
