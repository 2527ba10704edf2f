#pragma once

#include <ATen/core/Tensor.h>

namespace fastweights::detail {

/// The type of the arithmetic: fp64 for fp64 inputs, fp32 for all others.
inline at::ScalarType compute_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace fastweights::detail
