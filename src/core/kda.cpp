// Sets that would add code but no speed here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kda.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "fastweights/core/cpu.hpp"
#include "fastweights/core/kda-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace {

RuleForms<float> forms_float() { return dplr_forms<Kda, float>(); }
RuleForms<double> forms_double() { return dplr_forms<Kda, double>(); }

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(forms_float);
HWY_EXPORT(forms_double);

}  // namespace fastweights::core

namespace fastweights::cpu {

template <>
const core::RuleForms<float>& kda_forms() {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  static const RuleForms<float> forms = HWY_DYNAMIC_DISPATCH(forms_float)();
  return forms;
}

template <>
const core::RuleForms<double>& kda_forms() {
  using namespace core;
  static const RuleForms<double> forms = HWY_DYNAMIC_DISPATCH(forms_double)();
  return forms;
}

}  // namespace fastweights::cpu

#endif  // HWY_ONCE
