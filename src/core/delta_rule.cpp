#include "delta_rule_kernels.hpp"
#include "fastweights/core/check_params.hpp"
#include "fastweights/core/cpu.hpp"

namespace fastweights::cpu {
namespace {

template <class Real>
DeltaRuleParams<Real> checked(DeltaRuleParams<Real> params) {
  params.g = {};
  core::check_params("delta_rule", params);
  return params;
}

template <class Real>
DeltaRuleGradients<Real> without_gate(DeltaRuleGradients<Real> gradients) {
  gradients.d_g = {};
  return gradients;
}

}  // namespace

void delta_rule(const DeltaRuleParams<float>& params, const Executor& executor) {
  detail::forward(checked(params), executor);
}

void delta_rule(const DeltaRuleParams<double>& params, const Executor& executor) {
  detail::forward(checked(params), executor);
}

void delta_rule_recurrent(const DeltaRuleParams<float>& params, const Executor& executor) {
  detail::recurrent(checked(params), executor);
}

void delta_rule_recurrent(const DeltaRuleParams<double>& params, const Executor& executor) {
  detail::recurrent(checked(params), executor);
}

void delta_rule_backward(const DeltaRuleParams<float>& params,
                         const DeltaRuleGradients<float>& gradients, const Executor& executor) {
  detail::backward(checked(params), without_gate(gradients), executor);
}

void delta_rule_backward(const DeltaRuleParams<double>& params,
                         const DeltaRuleGradients<double>& gradients, const Executor& executor) {
  detail::backward(checked(params), without_gate(gradients), executor);
}

}  // namespace fastweights::cpu
