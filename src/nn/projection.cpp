#include "projection.hpp"

#include <ATen/ATen.h>

#include <cmath>

#include "fastweights/nn/initial_values.hpp"

namespace fastweights::nn {

namespace {

thread_local bool without_initial_values = false;

// torch::nn::Linear draws its weights when it is made: so it is made small.
torch::nn::Linear empty_projection(int64_t inputs, int64_t outputs) {
  torch::nn::Linear linear(torch::nn::LinearOptions(1, 1).bias(false));
  linear->options.in_features(inputs).out_features(outputs);
  linear->weight.set_data(at::empty({outputs, inputs}, linear->weight.options()));
  return linear;
}

}  // namespace

WithoutInitialValues::WithoutInitialValues() : before_(without_initial_values) {
  without_initial_values = true;
}

WithoutInitialValues::~WithoutInitialValues() { without_initial_values = before_; }

torch::nn::Linear make_projection(int64_t inputs, int64_t outputs, double range) {
  if (without_initial_values) return empty_projection(inputs, outputs);
  torch::nn::Linear linear(torch::nn::LinearOptions(inputs, outputs).bias(false));
  const at::NoGradGuard no_grad;
  linear->weight.normal_(0.0, range);
  return linear;
}

double residual_range(const LanguageModelConfig& config) {
  return config.initializer_range / std::sqrt(2.0 * static_cast<double>(config.layers));
}

}  // namespace fastweights::nn
