#pragma once

#include <optional>
#include <tuple>

#include "fastweights/session/write_policy.hpp"

namespace fastweights::python {

/// The fields of Python's SurpriseGate: low, high, least, most.
using GateFields = std::tuple<double, double, float, float>;
/// Those of WritePolicy: strength, surprise, memory_norm_cap, head_norm_cap, ridge.
using PolicyFields = std::tuple<float, std::optional<GateFields>, double, double, double>;

inline WritePolicy to_policy(const PolicyFields& fields) {
  const auto& [strength, surprise, memory_norm_cap, head_norm_cap, ridge] = fields;
  WritePolicy policy{.strength = strength,
                     .memory_norm_cap = memory_norm_cap,
                     .head_norm_cap = head_norm_cap,
                     .ridge = ridge};
  if (surprise) {
    const auto& [low, high, least, most] = *surprise;
    policy.surprise = {low, high, least, most};
  }
  return policy;
}

inline PolicyFields to_fields(const WritePolicy& policy) {
  std::optional<GateFields> gate;
  if (policy.surprise) {
    const auto& [low, high, least, most] = *policy.surprise;
    gate = {low, high, least, most};
  }
  return {policy.strength, gate, policy.memory_norm_cap, policy.head_norm_cap, policy.ridge};
}

}  // namespace fastweights::python
