#pragma once

#include <cstdint>

#include "fastweights/core/array.hpp"
#include "fastweights/core/executor.hpp"

// The delta rule at the head of a language model, whose values are the tokens that come next, on
// raw memory. Compiled for several instruction sets, the best one chosen at run time; docs/
// softmax_delta_rule.md has the derivation. Results do not depend on the executor.

namespace fastweights::core {

/// Inputs and outputs of one call. `Real`, float or double, is the type of the arithmetic and of
/// the state. Nothing is checked: a target must be below N.
template <class Real>
struct SoftmaxDeltaRuleParams {
  std::int64_t B = 0;  // rows
  std::int64_t T = 0;  // tokens
  std::int64_t D = 0;  // size of a hidden state
  std::int64_t N = 0;  // size of the vocabulary
  /// The first token of each row is the last one of an earlier call: its logits are corrected
  /// already, and it only writes.
  bool pending = false;

  ConstArray h;                          // [B, T, D]
  ConstArray logits;                     // [B, T, N]; not read by the backward pass
  const std::int64_t* target = nullptr;  // [B, T], negative where it is not known
  ConstArray eta;                        // [B, T]
  ConstArray g;                          // [B, T] or null: log-decay ≤ 0

  const Real* initial_state = nullptr;  // [B, D, N], null for zeros
  Real* final_state = nullptr;          // [B, D, N]; may equal initial_state
  Array corrected;                      // [B, T, N]; the backward pass reads it
};

/// Gradients of a loss with respect to everything that the forward call read.
template <class Real>
struct SoftmaxDeltaRuleGradients {
  ConstArray d_corrected;               // [B, T, N], null for zeros
  const Real* d_final_state = nullptr;  // [B, D, N], null for zeros
  Array d_h;                            // [B, T, D]
  Array d_logits;                       // [B, T, N]
  Array d_eta;                          // [B, T]
  Array d_g;                            // [B, T], null without g
  Real* d_initial_state = nullptr;      // [B, D, N]
};

/// The forward and the backward pass.
template <class Real>
struct SoftmaxDeltaRuleForms {
  void (*forward)(const SoftmaxDeltaRuleParams<Real>& params, const Executor& executor);
  void (*backward)(const SoftmaxDeltaRuleParams<Real>& params,
                   const SoftmaxDeltaRuleGradients<Real>& gradients, const Executor& executor);
};

}  // namespace fastweights::core

namespace fastweights::cpu {

/// The passes for Real float and double. Link `fastweights::cpu`.
template <class Real>
const core::SoftmaxDeltaRuleForms<Real>& softmax_delta_rule_forms();

}  // namespace fastweights::cpu
