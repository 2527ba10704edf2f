#include "fastweights/core/cpu.hpp"

namespace fastweights::cpu {

template <>
const core::RuleForms<float>& gated_delta_rule_forms() {
  return delta_rule_forms<float>();
}

template <>
const core::RuleForms<double>& gated_delta_rule_forms() {
  return delta_rule_forms<double>();
}

}  // namespace fastweights::cpu
