#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace fastweights {

/// Causal depthwise convolution over time, then SiLU:
/// `y_t = silu(Σ_w weight[:, w] ⊙ x_{t − W + 1 + w})`, where inputs before the first token come
/// from `initial_state` (zero without one).
/// @param x             [B, T, D], T may be 0
/// @param weight        [D, W]; column W − 1 multiplies the current token
/// @param initial_state [B, W − 1, D], the last W − 1 inputs, oldest first
/// @return y [B, T, D] of `x`'s type, and the state after the last token [B, W − 1, D] of the type
/// of
///         `initial_state` (of `x` without one); the state is a tensor of its own, not a view of
///         `x`
/// @throws ShapeError if the shapes disagree
std::tuple<at::Tensor, at::Tensor> short_convolution(
    const at::Tensor& x, const at::Tensor& weight,
    const std::optional<at::Tensor>& initial_state = std::nullopt);

}  // namespace fastweights
