#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

#include "fastweights/ops/fast_weight_memory.hpp"

namespace fastweights::detail {

/// What the rule of one layer leaves alone.
struct ProtectedPart {
  at::Tensor projector;  ///< Π [HV, K, K]
  at::Tensor kept;       ///< Π S₀ [HV, K, V]
  double least_free = 0.0;
};

/// Runs `rule` on what is free of the keys, with the protected part beside it. The rule gets
/// queries and keys of all value heads, which it must not normalise.
/// @param refused gets the writes added that were refused
std::tuple<at::Tensor, at::Tensor> protected_rule(const MemoryRuleCall& call,
                                                  const ProtectedPart& part, const MemoryRule& rule,
                                                  std::int64_t& refused);

/// (Gated) delta rule on queries and keys as they are.
std::tuple<at::Tensor, at::Tensor> delta_rule_of_any_keys(const MemoryRuleCall& call);

/// Rows of length one, one for each value head, as the rules make them: [B, T, H, K] → [B, T, HV,
/// K] of type `type`.
at::Tensor unit_rows(const at::Tensor& x, std::int64_t value_heads, at::ScalarType type);

}  // namespace fastweights::detail
