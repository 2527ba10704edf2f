#pragma once

#include "fastweights/core/check_params.hpp"
#include "fastweights/core/executor.hpp"
#include "fastweights/core/rule.hpp"

// The rules compiled once per instruction set (SSE4, AVX2, AVX-512; NEON; a scalar fallback), the
// best one chosen at run time. Link `fastweights::cpu`. All calls are thread-safe; results depend
// on the instruction set, never on the executor.

namespace fastweights::cpu {

using core::Executor;
using core::RuleGradients;
using core::RuleParams;

/// The forms of a rule, for Real float and double, which check nothing; the rules' own headers say
/// what they are. `delta_rule` and `gated_delta_rule` are one kernel: a null g is no gate.
template <class Real>
const core::RuleForms<Real>& delta_rule_forms();
template <class Real>
const core::RuleForms<Real>& gated_delta_rule_forms();
template <class Real>
const core::RuleForms<Real>& linear_attention_forms();
template <class Real>
const core::RuleForms<Real>& kda_forms();
template <class Real>
const core::RuleForms<Real>& generalized_delta_rule_forms();
template <class Real>
const core::RuleForms<Real>& momentum_delta_rule_forms();

/// Meaning and errors are those of the calls of the same name in `fastweights::core`.
template <class Real>
void delta_rule(RuleParams<Real> params, const Executor& executor) {
  params.g = {};
  core::check_params("delta_rule", params);
  delta_rule_forms<Real>().forward(params, executor);
}

template <class Real>
void delta_rule_recurrent(RuleParams<Real> params, const Executor& executor) {
  params.g = {};
  core::check_params("delta_rule", params);
  delta_rule_forms<Real>().recurrent(params, executor);
}

template <class Real>
void delta_rule_backward(RuleParams<Real> params, RuleGradients<Real> gradients,
                         const Executor& executor) {
  params.g = {};
  gradients.d_g = {};
  core::check_params("delta_rule", params);
  delta_rule_forms<Real>().backward(params, gradients, executor);
}

template <class Real>
void gated_delta_rule(const RuleParams<Real>& params, const Executor& executor) {
  core::check_gated_params(params);
  gated_delta_rule_forms<Real>().forward(params, executor);
}

template <class Real>
void gated_delta_rule_recurrent(const RuleParams<Real>& params, const Executor& executor) {
  core::check_gated_params(params);
  gated_delta_rule_forms<Real>().recurrent(params, executor);
}

template <class Real>
void gated_delta_rule_backward(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                               const Executor& executor) {
  core::check_gated_params(params);
  gated_delta_rule_forms<Real>().backward(params, gradients, executor);
}

/// The instruction set that the calls above use on this machine, as Highway names it ("AVX3", …).
const char* instruction_set();

}  // namespace fastweights::cpu
