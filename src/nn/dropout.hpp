#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace fastweights::nn {

/// x with each element 0 at that probability, and the others divided by the rest, so that means
/// stay, but for the rounding of x's type (Srivastava et al. 2014). Drawn from `generator`, without
/// one from PyTorch's own.
inline at::Tensor drop_elements(const at::Tensor& x, double probability,
                                const std::optional<at::Generator>& generator) {
  if (probability == 0.0) return x;
  const double kept = 1.0 - probability;
  const auto scale = at::empty_like(x, x.options().requires_grad(false));
  return x * scale.bernoulli_(kept, generator).div_(kept);
}

}  // namespace fastweights::nn
