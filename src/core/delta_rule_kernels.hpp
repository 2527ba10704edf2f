#pragma once

#include "fastweights/core/executor.hpp"
#include "fastweights/core/params.hpp"

// The one compiled skeleton behind `delta_rule` and `gated_delta_rule`; without a g there is no
// gate. Nothing is checked here.

namespace fastweights::cpu::detail {

void forward(const core::DeltaRuleParams<float>& params, const core::Executor& executor);
void forward(const core::DeltaRuleParams<double>& params, const core::Executor& executor);
void recurrent(const core::DeltaRuleParams<float>& params, const core::Executor& executor);
void recurrent(const core::DeltaRuleParams<double>& params, const core::Executor& executor);
void backward(const core::DeltaRuleParams<float>& params,
              const core::DeltaRuleGradients<float>& gradients, const core::Executor& executor);
void backward(const core::DeltaRuleParams<double>& params,
              const core::DeltaRuleGradients<double>& gradients, const core::Executor& executor);
const char* instruction_set();

}  // namespace fastweights::cpu::detail
