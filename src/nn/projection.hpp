#pragma once

#include <torch/nn/modules/linear.h>

#include "fastweights/nn/config.hpp"

namespace fastweights::nn {

/// A Linear without a bias, weights normal(0, range).
torch::nn::Linear make_projection(int64_t inputs, int64_t outputs, double range);

/// Range for layers that write into the residual stream, of which a model has 2 · layers (GPT-2).
double residual_range(const LanguageModelConfig& config);

/// Calls a Linear from a const method; its forward does not change it.
inline at::Tensor project(const torch::nn::Linear& linear, const at::Tensor& x) {
  return linear.ptr()->forward(x);
}

}  // namespace fastweights::nn
