// The forms of the delta rule, with a gate and without. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_DELTA_RULE_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_DELTA_RULE_INL_HPP_
#undef FASTWEIGHTS_CORE_DELTA_RULE_INL_HPP_
#else
#define FASTWEIGHTS_CORE_DELTA_RULE_INL_HPP_
#endif

#include "fastweights/core/chunkwise-inl.hpp"
#include "fastweights/core/chunkwise_backward-inl.hpp"
#include "fastweights/core/recurrent-inl.hpp"
#include "fastweights/core/rule.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

template <class Real>
RuleForms<Real> delta_rule_forms() {
  return {&forward<Real>, &recurrent<Real>, &backward<Real>};
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
