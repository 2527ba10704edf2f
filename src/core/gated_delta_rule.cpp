#include "delta_rule_kernels.hpp"
#include "fastweights/core/check_params.hpp"
#include "fastweights/core/cpu.hpp"

namespace fastweights::cpu {

void gated_delta_rule(const DeltaRuleParams<float>& params, const Executor& executor) {
  core::check_gated_params(params);
  detail::forward(params, executor);
}

void gated_delta_rule(const DeltaRuleParams<double>& params, const Executor& executor) {
  core::check_gated_params(params);
  detail::forward(params, executor);
}

void gated_delta_rule_recurrent(const DeltaRuleParams<float>& params, const Executor& executor) {
  core::check_gated_params(params);
  detail::recurrent(params, executor);
}

void gated_delta_rule_recurrent(const DeltaRuleParams<double>& params, const Executor& executor) {
  core::check_gated_params(params);
  detail::recurrent(params, executor);
}

void gated_delta_rule_backward(const DeltaRuleParams<float>& params,
                               const DeltaRuleGradients<float>& gradients,
                               const Executor& executor) {
  core::check_gated_params(params);
  detail::backward(params, gradients, executor);
}

void gated_delta_rule_backward(const DeltaRuleParams<double>& params,
                               const DeltaRuleGradients<double>& gradients,
                               const Executor& executor) {
  core::check_gated_params(params);
  detail::backward(params, gradients, executor);
}

}  // namespace fastweights::cpu
