#pragma once

#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <vector>

// Comparisons that the tests of the operators and of the layers share.

namespace fastweights::test {

using at::Tensor;
using Tensors = std::vector<Tensor>;

/// RMS(value − exact) / RMS(exact) in fp64; RMS(value) where `exact` is zero throughout.
inline double error_ratio(const Tensor& value, const Tensor& exact) {
  if (value.sizes() != exact.sizes()) return HUGE_VAL;
  if (exact.numel() == 0) return 0.0;
  const auto rms = [](const Tensor& x) {
    return std::sqrt(x.to(at::kDouble).square().mean().item<double>());
  };
  const double size = rms(exact);
  return rms(value.to(at::kDouble) - exact.to(at::kDouble)) / (size == 0.0 ? 1.0 : size);
}

/// Stated once: RMS errors of outputs and of gradients against fp64.
struct Tolerance {
  double output;
  double gradient;
};

inline Tolerance tolerance(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return {1e-12, 1e-12};
    case at::kFloat: return {1e-5, 1e-4};
    default: return {5e-3, 1e-2};
  }
}

struct Errors {
  double output = 0.0;
  double gradient = 0.0;  // the largest of all inputs'
};

using Function = std::function<Tensor(const Tensors&)>;

/// Errors of `op` on `inputs` of type `type`, and of its gradients, against `exact` in fp64.
inline Errors compare(const Function& op, const Function& exact, const Tensors& inputs,
                      at::ScalarType type) {
  Tensors given;
  Tensors wide;
  for (const auto& input : inputs) {
    given.push_back(input.to(type).detach().requires_grad_());
    wide.push_back(given.back().detach().to(at::kDouble).requires_grad_());
  }
  const auto y = op(given);
  const auto expected = exact(wide);
  const auto outer = at::randn(y.sizes(), y.options());
  y.backward(outer);
  expected.backward(outer.to(at::kDouble));
  Errors errors{error_ratio(y, expected), 0.0};
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto gradient = given[i].grad().defined() ? given[i].grad() : at::zeros_like(given[i]);
    const auto wanted = wide[i].grad().defined() ? wide[i].grad() : at::zeros_like(wide[i]);
    errors.gradient = std::max(errors.gradient, error_ratio(gradient, wanted));
  }
  return errors;
}

}  // namespace fastweights::test
