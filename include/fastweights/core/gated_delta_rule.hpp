#pragma once

#include "fastweights/core/check_params.hpp"
#include "fastweights/core/chunkwise-inl.hpp"
#include "fastweights/core/chunkwise_backward-inl.hpp"
#include "fastweights/core/executor.hpp"
#include "fastweights/core/recurrent-inl.hpp"
#include "fastweights/core/rule.hpp"

// The gated delta rule on raw memory, compiled for the instruction set that the including unit is
// compiled for. `fastweights/core/cpu.hpp` has the same calls compiled for several, chosen at run
// time.

namespace fastweights::core {

/// S ← exp(g) S, then the delta write S ← S + β k (v − Sᵀk)ᵀ; o = scale · Sᵀq (Yang et al. 2025,
/// "Gated Delta Networks", eq. 10). Reads everything in `params`, writes o and, if not null,
/// final_state. Throws ShapeError. Real is float or double.
template <class Real>
void gated_delta_rule(const RuleParams<Real>& params,
                      const Executor& executor = serial_executor()) {
  check_gated_params(params);
  HWY_NAMESPACE::forward(params, executor);
}

/// The same token by token on the working state, final_state or narrow_state, which is not null.
template <class Real>
void gated_delta_rule_recurrent(const RuleParams<Real>& params,
                                const Executor& executor = serial_executor()) {
  check_gated_params(params);
  HWY_NAMESPACE::recurrent(params, executor);
}

/// Gradients of `gated_delta_rule`. Throws ShapeError.
template <class Real>
void gated_delta_rule_backward(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                               const Executor& executor = serial_executor()) {
  check_gated_params(params);
  HWY_NAMESPACE::backward(params, gradients, executor);
}

}  // namespace fastweights::core
