#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "instruction_set.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "fastweights/core/cpu.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace {

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(target_name);

}  // namespace fastweights::core

namespace fastweights::cpu {

const char* instruction_set() {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  return HWY_DYNAMIC_DISPATCH(target_name)();
}

}  // namespace fastweights::cpu

#endif  // HWY_ONCE
