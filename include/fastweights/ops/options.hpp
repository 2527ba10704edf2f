#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastweights {

/// What every rule takes beside its tensors.
struct RuleOptions {
  std::optional<double> scale;  ///< of the output; 1 / sqrt(K) unless given
  /// [B, HV, K, V], packed [N, HV, K, V]: fp32 (fp64 for fp64 inputs) or bf16; fp32 zeros unless
  /// given.
  std::optional<at::Tensor> initial_state;
  bool output_final_state = false;       ///< whether `RuleResult::final_state` is filled
  std::optional<at::Tensor> cu_seqlens;  ///< packed input: int64 [N + 1], with B = 1
  bool use_qk_l2norm = false;            ///< q and k become x · rsqrt(Σx² + 1e-6)
};

/// What every rule returns; `auto [o, final_state] = …` works.
struct RuleResult {
  at::Tensor o;                           ///< [B, T, HV, V], v's dtype
  std::optional<at::Tensor> final_state;  ///< [B or N, HV, K, V], typed as the initial one
};

}  // namespace fastweights
