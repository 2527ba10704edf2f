#include "fastweights/session/write_policy.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "fastweights/core/error.hpp"

namespace fastweights {
namespace {

void check(const char* name, double value, double most) {
  if (value >= 0.0 && value <= most && std::isfinite(value)) return;
  const std::string range =
      std::isfinite(most) ? "in [0, " + std::to_string(most) + "]" : "at least 0 and finite";
  throw Error(std::string("write policy: ") + name + " must be " + range + ", got " +
              std::to_string(value));
}

}  // namespace

void check_write_policy(const WritePolicy& policy) {
  check("strength", policy.strength, 2.0);
  check("memory_norm_cap", policy.memory_norm_cap, HUGE_VAL);
  check("head_norm_cap", policy.head_norm_cap, HUGE_VAL);
  check("ridge", policy.ridge, HUGE_VAL);
  if (policy.ridge > 0.0 && policy.memory_norm_cap > 0.0) {
    throw Error(
        "write policy: a memory_norm_cap has no place beside a ridge: a matrix that was scaled "
        "down "
        "is no least-squares solution");
  }
  if (!policy.surprise) return;
  const auto& [low, high, least, most] = *policy.surprise;
  check("low", low, HUGE_VAL);
  check("high", high, HUGE_VAL);
  check("least", least, 2.0);
  check("most", most, 2.0);
  if (low >= high) {
    throw Error("write policy: low must be below high, got " + std::to_string(low) + " and " +
                std::to_string(high));
  }
}

float strength_under(const WritePolicy& policy, float strength, double bits) {
  float factor = policy.strength;
  if (policy.surprise) {
    const auto& [low, high, least, most] = *policy.surprise;
    const double share = std::clamp((bits - low) / (high - low), 0.0, 1.0);
    factor *= static_cast<float>(least + share * (most - least));
  }
  return std::min(strength * factor, 2.0F);
}

}  // namespace fastweights
