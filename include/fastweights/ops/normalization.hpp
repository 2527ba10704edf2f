#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

namespace fastweights {

/// Root-mean-square normalisation over the last dimension (Zhang & Sennrich, arXiv:1910.07467):
/// `x · rsqrt(mean(x²) + eps) · weight`, computed in fp32 (fp64 for fp64 inputs).
/// @param x      [..., D]
/// @param weight [D], any floating-point type
/// @param dtype  type of the result; `x`'s unless given. Under autocast, autocast's type, so that
///               the projections that follow need no conversion of their own.
/// @return [..., D]
/// @throws ShapeError if `weight` is not [D]
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps,
                    std::optional<at::ScalarType> dtype = std::nullopt);

/// `rms_norm(x) · weight · silu(gate)`: the output gate of Gated DeltaNet (arXiv:2412.06464).
/// @param x, gate [..., D] of the same shape
/// @param weight  [D]
/// @return [..., D] of `x`'s type
/// @throws ShapeError if the shapes disagree
at::Tensor gated_rms_norm(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight,
                          double eps);

/// `silu(gate) · up`, the gated unit of a feed-forward layer (Shazeer, arXiv:2002.05202).
/// @param gate, up tensors of the same shape
/// @throws ShapeError if the shapes disagree
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace fastweights
