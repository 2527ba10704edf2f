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

/// Runs `rule` on what is free of the keys, with the protected part beside it.
/// @param call    from with_unit_keys(), as is what `rule` gets but for the length of the keys
/// @param refused gets the writes added that were refused
/// @return outputs and states, of the state's type
std::tuple<at::Tensor, at::Tensor> protected_rule(const MemoryRuleCall& call,
                                                  const ProtectedPart& part, const MemoryRule& rule,
                                                  std::int64_t& refused);

/// (Gated) delta rule on queries and keys as they are; outputs and states, of the state's type.
std::tuple<at::Tensor, at::Tensor> delta_rule_of_any_keys(const MemoryRuleCall& call);

/// The call with the queries and keys that the rules make of its own: of length one, one for each
/// value head, [B, T, HV, K]. They and the values get the type of the state.
MemoryRuleCall with_unit_keys(const MemoryRuleCall& call);

}  // namespace fastweights::detail
