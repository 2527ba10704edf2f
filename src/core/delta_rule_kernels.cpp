// Sets that would add code but no speed here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "delta_rule_kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "delta_rule_kernels.hpp"
#include "fastweights/core/chunkwise-inl.hpp"
#include "fastweights/core/chunkwise_backward-inl.hpp"
#include "fastweights/core/recurrent-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace {

void forward_float(const DeltaRuleParams<float>& params, const Executor& executor) {
  forward(params, executor);
}
void forward_double(const DeltaRuleParams<double>& params, const Executor& executor) {
  forward(params, executor);
}
void recurrent_float(const DeltaRuleParams<float>& params, const Executor& executor) {
  recurrent(params, executor);
}
void recurrent_double(const DeltaRuleParams<double>& params, const Executor& executor) {
  recurrent(params, executor);
}
void backward_float(const DeltaRuleParams<float>& params,
                    const DeltaRuleGradients<float>& gradients, const Executor& executor) {
  backward(params, gradients, executor);
}
void backward_double(const DeltaRuleParams<double>& params,
                     const DeltaRuleGradients<double>& gradients, const Executor& executor) {
  backward(params, gradients, executor);
}
const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(forward_float);
HWY_EXPORT(forward_double);
HWY_EXPORT(recurrent_float);
HWY_EXPORT(recurrent_double);
HWY_EXPORT(backward_float);
HWY_EXPORT(backward_double);
HWY_EXPORT(target_name);

}  // namespace fastweights::core

namespace fastweights::cpu::detail {

using core::DeltaRuleGradients;
using core::DeltaRuleParams;
using core::Executor;

void forward(const DeltaRuleParams<float>& params, const Executor& executor) {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  HWY_DYNAMIC_DISPATCH(forward_float)(params, executor);
}
void forward(const DeltaRuleParams<double>& params, const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(forward_double)(params, executor);
}
void recurrent(const DeltaRuleParams<float>& params, const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(recurrent_float)(params, executor);
}
void recurrent(const DeltaRuleParams<double>& params, const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(recurrent_double)(params, executor);
}
void backward(const DeltaRuleParams<float>& params, const DeltaRuleGradients<float>& gradients,
              const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(backward_float)(params, gradients, executor);
}
void backward(const DeltaRuleParams<double>& params, const DeltaRuleGradients<double>& gradients,
              const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(backward_double)(params, gradients, executor);
}
const char* instruction_set() {
  using namespace core;
  return HWY_DYNAMIC_DISPATCH(target_name)();
}

}  // namespace fastweights::cpu::detail

#endif  // HWY_ONCE
