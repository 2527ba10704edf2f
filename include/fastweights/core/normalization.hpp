#pragma once

#include <cstdint>

#include "fastweights/core/array.hpp"
#include "fastweights/core/executor.hpp"

// Norms and gated units on raw memory, compiled for several instruction sets, the best chosen at
// run time. The arithmetic is fp64 if `x` (or `gate` of SwiGLU) is, else fp32; element types may
// differ from array to array otherwise. Results do not depend on the executor.

namespace fastweights::cpu {

using core::Array;
using core::ConstArray;
using core::Executor;

/// y = x · rsqrt(mean(x²) + eps) · weight, row by row; times silu(gate) if there is a gate.
struct RmsNormParams {
  std::int64_t rows = 0;
  std::int64_t size = 0;
  double eps = 1e-6;
  ConstArray x;       // [rows, size]
  ConstArray weight;  // [size]
  ConstArray gate;    // [rows, size] or null
  Array y;            // [rows, size]
};

/// Gradients; `RmsNormParams::y` is not read.
struct RmsNormGradients {
  ConstArray d_y;  // [rows, size]
  Array d_x;       // [rows, size]
  Array d_weight;  // [size]
  Array d_gate;    // [rows, size], null without a gate
};

void rms_norm(const RmsNormParams& params, const Executor& executor);
void rms_norm_backward(const RmsNormParams& params, const RmsNormGradients& gradients,
                       const Executor& executor);

/// y = silu(gate) · up
struct SwigluParams {
  std::int64_t count = 0;
  ConstArray gate;  // [count]
  ConstArray up;    // [count]
  Array y;          // [count]
};

/// Gradients of SwiGLU.
struct SwigluGradients {
  ConstArray d_y;  // [count]
  Array d_gate;    // [count]
  Array d_up;      // [count]
};

void swiglu(const SwigluParams& params, const Executor& executor);
void swiglu_backward(const SwigluParams& params, const SwigluGradients& gradients,
                     const Executor& executor);

}  // namespace fastweights::cpu
