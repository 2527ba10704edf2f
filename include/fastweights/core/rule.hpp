#pragma once

#include <cstdint>

#include "fastweights/core/executor.hpp"
#include "fastweights/core/params.hpp"
#include "fastweights/core/view.hpp"

namespace fastweights::core {

/// Inputs and outputs of one call of a rule; what a rule does not have stays null. `Real`, float or
/// double, is the type of the arithmetic and of the state.
template <class Real>
struct RuleParams : Packing {
  double scale = 1.0;          // of the output
  bool use_qk_l2norm = false;  // q and k become x · rsqrt(Σx² + 1e-6)
  bool channel_gate = false;   // whether g has a value for each channel of a key

  ConstView q;     // [B, T, H, K]
  ConstView k;     // [B, T, H, K]
  ConstView v;     // [B, T, HV, V]
  ConstView g;     // [B, T, HV], or [B, T, HV, K] with channel_gate: log-decay ≤ 0
  ConstView beta;  // [B, T, HV]
  ConstView a;     // [B, T, H, K]
  ConstView b;     // [B, T, H, K]
  ConstView p;     // [B, T, H, K]
  ConstView mu;    // [B, T, HV]
  ConstView eta;   // [B, T, HV]

  const Real* initial_state = nullptr;     // [N, HV, K, V], null for zeros
  const Real* initial_momentum = nullptr;  // the same
  Real* final_state = nullptr;     // [N, HV, K, V], null if not wanted; may equal initial_state
  Real* final_momentum = nullptr;  // the same
  View o;                          // [B, T, HV, V]; overlaps no input

  // Recurrent forms of float only: states in bf16, in the place of final_state and final_momentum
  // (which are null then, as the initial ones). Widened for the call, and rounded to nearest even
  // at its end.
  std::uint16_t* narrow_state = nullptr;     // [N, HV, K, V]
  std::uint16_t* narrow_momentum = nullptr;  // the same
};

/// Gradients of a loss with respect to everything that the forward call read; null where the rule
/// has no such input. The inputs' views lie in the forward call's `RuleParams`.
template <class Real>
struct RuleGradients {
  ConstView d_o;                           // [B, T, HV, V], null for zeros
  const Real* d_final_state = nullptr;     // [N, HV, K, V], null for zeros
  const Real* d_final_momentum = nullptr;  // the same
  View d_q;                                // shapes as in RuleParams
  View d_k;
  View d_v;
  View d_g;
  View d_beta;
  View d_a;
  View d_b;
  View d_p;
  View d_mu;
  View d_eta;
  Real* d_initial_state = nullptr;     // [N, HV, K, V], null if not wanted
  Real* d_initial_momentum = nullptr;  // the same
};

/// The three forms of a rule: chunkwise, recurrent (token by token, with final_state as the working
/// state, which must not be null unless narrow_state is there), and the gradients of the first.
template <class Real>
struct RuleForms {
  void (*forward)(const RuleParams<Real>& params, const Executor& executor);
  void (*recurrent)(const RuleParams<Real>& params, const Executor& executor);
  void (*backward)(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                   const Executor& executor);
};

}  // namespace fastweights::core
