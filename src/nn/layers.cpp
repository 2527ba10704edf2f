#include "fastweights/nn/layers.hpp"

#include <ATen/ATen.h>

#include <cmath>

#include "fastweights/ops/fast_weight_memory.hpp"
#include "fastweights/ops/normalization.hpp"
#include "fastweights/ops/sliding_window_attention.hpp"
#include "projection.hpp"

namespace fastweights::nn {
namespace {

// Half-life of a head's gate when training starts, in tokens: heads in the coarse order, layers in
// the fine one, so that every layer has some of every scale.
double initial_half_life(const LanguageModelConfig& config, int64_t layer, int64_t head) {
  const auto count = config.memory_value_heads * config.layers;
  const auto rank = head * config.layers + layer;
  const auto fraction =
      count > 1 ? static_cast<double>(rank) / static_cast<double>(count - 1) : 0.5;
  return config.half_life_min * std::pow(config.half_life_max / config.half_life_min, fraction);
}

// The x for which exp(−softplus(x)) = ½^(1 / half_life).
double dt_bias_of(double half_life) { return std::log(std::expm1(std::log(2.0) / half_life)); }

}  // namespace

RMSNormImpl::RMSNormImpl(int64_t width, double epsilon) : width_(width), epsilon_(epsilon) {
  reset();
}

void RMSNormImpl::reset() { weight = register_parameter("weight", at::ones({width_})); }

at::Tensor RMSNormImpl::forward(const at::Tensor& x) const { return rms_norm(x, weight, epsilon_); }

SwiGLUImpl::SwiGLUImpl(LanguageModelConfig config) : config_(std::move(config)) { reset(); }

void SwiGLUImpl::reset() {
  const auto hidden = config_.feed_forward_width;
  gate = register_module("gate", make_projection(config_.width, hidden, config_.initializer_range));
  up = register_module("up", make_projection(config_.width, hidden, config_.initializer_range));
  down = register_module("down", make_projection(hidden, config_.width, residual_range(config_)));
}

at::Tensor SwiGLUImpl::forward(const at::Tensor& x) const {
  return project(down, swiglu(project(gate, x), project(up, x)));
}

SlidingWindowAttentionImpl::SlidingWindowAttentionImpl(LanguageModelConfig config)
    : config_(std::move(config)) {
  reset();
}

void SlidingWindowAttentionImpl::reset() {
  const auto width = config_.width;
  const auto range = config_.initializer_range;
  query = register_module("query", make_projection(width, width, range));
  key = register_module("key", make_projection(width, width, range));
  value = register_module("value", make_projection(width, width, range));
  output = register_module("output", make_projection(width, width, residual_range(config_)));
  const auto heads = config_.attention_heads;
  const auto size = width / heads;
  const auto sinks = config_.attention_sinks;
  sink_key = register_parameter("sink_key", at::randn({heads, sinks, size / 2}) * range);
  sink_value = register_parameter("sink_value", at::randn({heads, sinks, size}) * range);
}

AttentionState SlidingWindowAttentionImpl::initial_state(int64_t batch) const {
  const auto heads = config_.attention_heads;
  const std::vector<int64_t> shape{batch, config_.attention_window, heads, config_.width / heads};
  const auto options = query->weight.options().requires_grad(false);
  return {at::zeros(shape, options), at::zeros(shape, options)};
}

SlidingWindowAttentionImpl::Output SlidingWindowAttentionImpl::forward(const at::Tensor& x,
                                                                       const AttentionState& state,
                                                                       const at::Tensor& position,
                                                                       bool in_place) const {
  const SlidingWindowAttentionParams params{config_.attention_heads, config_.attention_window,
                                            config_.rope_base, in_place};
  auto [o, next_key, next_value] =
      sliding_window_attention(project(query, x), project(key, x), project(value, x), sink_key,
                               sink_value, state.key, state.value, position, params);
  return {project(output, o), {std::move(next_key), std::move(next_value)}};
}

FastWeightMemoryImpl::FastWeightMemoryImpl(LanguageModelConfig config, int64_t layer)
    : config_(std::move(config)), layer_(layer) {
  reset();
}

void FastWeightMemoryImpl::reset() {
  const auto width = config_.width;
  const auto range = config_.initializer_range;
  const auto heads = config_.memory_value_heads;
  const auto keys = config_.memory_heads * config_.memory_key_size;
  const auto values = heads * config_.memory_value_size;
  query = register_module("query", make_projection(width, keys, range));
  key = register_module("key", make_projection(width, keys, range));
  value = register_module("value", make_projection(width, values, range));
  beta = register_module("beta", make_projection(width, heads, range));
  gate = register_module("gate", make_projection(width, values, range));
  output = register_module("output", make_projection(values, width, residual_range(config_)));
  const auto taps = config_.convolution_size;
  const auto bound = 1.0 / std::sqrt(static_cast<double>(taps));
  convolution_weight = register_parameter(
      "convolution_weight", at::empty({2 * keys + values, taps}).uniform_(-bound, bound));
  norm_weight = register_parameter("norm_weight", at::ones({config_.memory_value_size}));
  if (config_.memory_initial_matrix) {
    initial_matrix = register_parameter(
        "initial_matrix", at::zeros({heads, config_.memory_key_size, config_.memory_value_size}));
  }
  if (config_.memory_rule == "delta_rule") return;
  decay = register_module("decay", make_projection(width, heads, range));
  a_log = register_parameter("a_log", at::zeros({heads}));
  auto bias = at::empty({heads});
  for (int64_t head = 0; head < heads; ++head) {
    bias[head] = dt_bias_of(initial_half_life(config_, layer_, head));
  }
  dt_bias = register_parameter("dt_bias", bias);
}

MemoryState FastWeightMemoryImpl::initial_state(int64_t batch) const {
  const auto channels = convolution_weight.size(0);
  const auto options = query->weight.options().requires_grad(false);
  const auto wide = options.dtype(options.dtype() == at::kDouble ? at::kDouble : at::kFloat);
  auto matrix = initial_matrix.defined()
                    ? initial_matrix.to(wide).repeat({batch, 1, 1, 1})
                    : at::zeros({batch, config_.memory_value_heads, config_.memory_key_size,
                                 config_.memory_value_size},
                                wide);
  return {std::move(matrix), at::zeros({batch, config_.convolution_size - 1, channels}, options)};
}

FastWeightMemoryImpl::Output FastWeightMemoryImpl::forward(const at::Tensor& x,
                                                           const MemoryState& state, bool in_place,
                                                           const WriteStrength& write,
                                                           const MemoryRule& rule) const {
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional(tensor) : std::nullopt;
  };
  const FastWeightMemoryParams params{config_.memory_heads, config_.memory_value_heads,
                                      config_.beta_max,     config_.memory_rule,
                                      config_.norm_epsilon, in_place};
  auto [o, next, conv] =
      fast_weight_memory(project(query, x), project(key, x), project(value, x), project(beta, x),
                         decay.is_empty() ? std::nullopt : std::optional(project(decay, x)),
                         project(gate, x), convolution_weight, optional(a_log), optional(dt_bias),
                         norm_weight, state.state, state.conv, params, write, rule);
  return {project(output, o), {std::move(next), std::move(conv)}};
}

}  // namespace fastweights::nn
