// The delta rule, with a gate and without: one skeleton, for which a missing g is no gate.

// Sets that would add code but no speed here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "delta_rule.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "fastweights/core/chunkwise-inl.hpp"
#include "fastweights/core/chunkwise_backward-inl.hpp"
#include "fastweights/core/cpu.hpp"
#include "fastweights/core/recurrent-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace {

RuleForms<float> forms_float() { return {&forward<float>, &recurrent<float>, &backward<float>}; }
RuleForms<double> forms_double() {
  return {&forward<double>, &recurrent<double>, &backward<double>};
}
const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(forms_float);
HWY_EXPORT(forms_double);
HWY_EXPORT(target_name);

}  // namespace fastweights::core

namespace fastweights::cpu {

template <>
const core::RuleForms<float>& delta_rule_forms() {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  static const RuleForms<float> forms = HWY_DYNAMIC_DISPATCH(forms_float)();
  return forms;
}

template <>
const core::RuleForms<double>& delta_rule_forms() {
  using namespace core;
  static const RuleForms<double> forms = HWY_DYNAMIC_DISPATCH(forms_double)();
  return forms;
}

const char* instruction_set() {
  using namespace core;
  return HWY_DYNAMIC_DISPATCH(target_name)();
}

}  // namespace fastweights::cpu

#endif  // HWY_ONCE
