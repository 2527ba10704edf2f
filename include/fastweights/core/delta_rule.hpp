#pragma once

#include "fastweights/core/check_params.hpp"
#include "fastweights/core/chunkwise-inl.hpp"
#include "fastweights/core/chunkwise_backward-inl.hpp"
#include "fastweights/core/executor.hpp"
#include "fastweights/core/recurrent-inl.hpp"
#include "fastweights/core/rule.hpp"

// The delta rule on raw memory, compiled for the instruction set that the including unit is
// compiled for. `fastweights/core/cpu.hpp` has the same calls compiled for several, chosen at run
// time.

namespace fastweights::core {

/// S ← S + β k (v − Sᵀk)ᵀ, o = scale · Sᵀq (Schlag et al. 2021, eq. 24; chunkwise form: Yang et al.
/// 2024). Reads everything in `params` but g, writes o and, if not null, final_state.
/// Throws ShapeError. Real is float or double.
template <class Real>
void delta_rule(RuleParams<Real> params, const Executor& executor = serial_executor()) {
  params.g = {};
  check_params("delta_rule", params);
  HWY_NAMESPACE::forward(params, executor);
}

/// The same token by token on the working state, final_state or narrow_state, which is not null.
template <class Real>
void delta_rule_recurrent(RuleParams<Real> params, const Executor& executor = serial_executor()) {
  params.g = {};
  check_params("delta_rule", params);
  HWY_NAMESPACE::recurrent(params, executor);
}

/// Gradients of `delta_rule`. Throws ShapeError.
template <class Real>
void delta_rule_backward(RuleParams<Real> params, RuleGradients<Real> gradients,
                         const Executor& executor = serial_executor()) {
  params.g = {};
  gradients.d_g = {};
  check_params("delta_rule", params);
  HWY_NAMESPACE::backward(params, gradients, executor);
}

}  // namespace fastweights::core
