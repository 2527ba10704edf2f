#pragma once

#include "fastweights/core/executor.hpp"
#include "fastweights/core/params.hpp"
#include "fastweights/core/rule.hpp"

// The rules compiled once per instruction set (SSE4, AVX2, AVX-512; NEON; a scalar fallback), the
// best one chosen at run time. Link `fastweights::cpu`. Meaning and errors are those of the calls
// of the same name in `fastweights::core`. All calls are thread-safe; results depend on the
// instruction set, never on the executor.

namespace fastweights::cpu {

using core::DeltaRuleGradients;
using core::DeltaRuleParams;
using core::Executor;

void delta_rule(const DeltaRuleParams<float>& params, const Executor& executor);
void delta_rule(const DeltaRuleParams<double>& params, const Executor& executor);
void delta_rule_recurrent(const DeltaRuleParams<float>& params, const Executor& executor);
void delta_rule_recurrent(const DeltaRuleParams<double>& params, const Executor& executor);
void delta_rule_backward(const DeltaRuleParams<float>& params,
                         const DeltaRuleGradients<float>& gradients, const Executor& executor);
void delta_rule_backward(const DeltaRuleParams<double>& params,
                         const DeltaRuleGradients<double>& gradients, const Executor& executor);

void gated_delta_rule(const DeltaRuleParams<float>& params, const Executor& executor);
void gated_delta_rule(const DeltaRuleParams<double>& params, const Executor& executor);
void gated_delta_rule_recurrent(const DeltaRuleParams<float>& params, const Executor& executor);
void gated_delta_rule_recurrent(const DeltaRuleParams<double>& params, const Executor& executor);
void gated_delta_rule_backward(const DeltaRuleParams<float>& params,
                               const DeltaRuleGradients<float>& gradients,
                               const Executor& executor);
void gated_delta_rule_backward(const DeltaRuleParams<double>& params,
                               const DeltaRuleGradients<double>& gradients,
                               const Executor& executor);

/// The forms of the other rules, for Real float and double; the rules' own headers say what they
/// are.
template <class Real>
const core::RuleForms<Real>& linear_attention_forms();
template <class Real>
const core::RuleForms<Real>& kda_forms();
template <class Real>
const core::RuleForms<Real>& generalized_delta_rule_forms();
template <class Real>
const core::RuleForms<Real>& momentum_delta_rule_forms();

/// The instruction set that the calls above use on this machine, as Highway names it ("AVX3", …).
const char* instruction_set();

}  // namespace fastweights::cpu
