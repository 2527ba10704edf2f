#include "projection.hpp"

#include <ATen/ATen.h>

#include <cmath>

namespace fastweights::nn {

torch::nn::Linear make_projection(int64_t inputs, int64_t outputs, double range) {
  torch::nn::Linear linear(torch::nn::LinearOptions(inputs, outputs).bias(false));
  const at::NoGradGuard no_grad;
  linear->weight.normal_(0.0, range);
  return linear;
}

double residual_range(const LanguageModelConfig& config) {
  return config.initializer_range / std::sqrt(2.0 * static_cast<double>(config.layers));
}

}  // namespace fastweights::nn
