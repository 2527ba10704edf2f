#pragma once

#include <cstdint>

#include "fastweights/core/array.hpp"
#include "fastweights/core/executor.hpp"

// Causal depthwise convolution and SiLU on raw memory, compiled for several instruction sets. The
// arithmetic is fp64 if `x` is, else fp32. Results do not depend on the executor.

namespace fastweights::cpu {

using core::Array;
using core::ConstArray;
using core::Executor;

/// y_t = silu(Σ_w weight[:, w] ⊙ x_{t − W + 1 + w}); `state` holds the W − 1 inputs before the
/// first.
struct ShortConvolutionParams {
  std::int64_t batch = 0;
  std::int64_t tokens = 0;
  std::int64_t channels = 0;
  std::int64_t taps = 1;
  ConstArray x;       // [batch, tokens, channels]
  ConstArray weight;  // [channels, taps]
  ConstArray state;   // [batch, taps − 1, channels]
  Array y;            // [batch, tokens, channels]
};

/// Gradients; `ShortConvolutionParams::y` is not read.
struct ShortConvolutionGradients {
  ConstArray d_y;  // [batch, tokens, channels]
  Array d_x;       // [batch, tokens, channels]
  Array d_weight;  // [channels, taps]
  Array d_state;   // [batch, taps − 1, channels]
};

void short_convolution(const ShortConvolutionParams& params, const Executor& executor);
void short_convolution_backward(const ShortConvolutionParams& params,
                                const ShortConvolutionGradients& gradients,
                                const Executor& executor);

}  // namespace fastweights::cpu
