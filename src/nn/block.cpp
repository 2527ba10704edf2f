#include <ATen/ATen.h>

#include "dropout.hpp"
#include "fastweights/nn/layers.hpp"

namespace fastweights::nn {

BlockImpl::BlockImpl(LanguageModelConfig config, int64_t layer)
    : config_(std::move(config)), layer_(layer) {
  reset();
}

void BlockImpl::reset() {
  const auto width = config_.width;
  mixer_norm = register_module("mixer_norm", RMSNorm(width, config_.norm_epsilon));
  if (config_.attention) {
    attention = register_module("attention", SlidingWindowAttention(config_));
    mix_attention = register_parameter("mix_attention", at::ones({width}));
  }
  if (config_.memory) {
    memory = register_module("memory", FastWeightMemory(config_, layer_));
    mix_memory = register_parameter("mix_memory", at::ones({width}));
  }
  feed_forward_norm = register_module("feed_forward_norm", RMSNorm(width, config_.norm_epsilon));
  feed_forward = register_module("feed_forward", SwiGLU(config_));
}

BlockState BlockImpl::initial_state(int64_t batch) const {
  BlockState state;
  if (!memory.is_empty()) state.memory = memory->initial_state(batch);
  if (!attention.is_empty()) state.attention = attention->initial_state(batch);
  return state;
}

at::Tensor BlockImpl::mix(const at::Tensor& x, const BlockState& state, const at::Tensor& position,
                          const Options& options, BlockState& next) const {
  const auto normed = mixer_norm->forward(x);
  const auto drop = [&](const at::Tensor& o) {
    return drop_elements(o, is_training() ? config_.dropout : 0.0, options.generator);
  };
  auto mixed = x;
  if (attention_enabled && !attention.is_empty()) {
    auto result = attention->forward(normed, state.attention, position, options.in_place);
    next.attention = std::move(result.state);
    mixed = mixed.addcmul(mix_attention, drop(result.o));
  }
  if (memory_enabled && !memory.is_empty()) {
    auto result =
        memory->forward(normed, state.memory, options.in_place, options.write, options.rule);
    next.memory = std::move(result.state);
    const auto scale =
        options.memory_keep.defined() ? mix_memory * options.memory_keep : mix_memory;
    mixed = mixed.addcmul(scale, drop(result.o));
  }
  return mixed;
}

BlockImpl::Output BlockImpl::forward(const at::Tensor& x, const BlockState& state,
                                     const at::Tensor& position, const Options& options) const {
  BlockState next = state;
  const auto mixed = mix(x, state, position, options, next);
  if (options.feed_forward != nullptr) return {(*options.feed_forward)(mixed), std::move(next)};
  const auto o = feed_forward->forward(feed_forward_norm->forward(mixed));
  const double dropout = is_training() ? config_.dropout : 0.0;
  return {mixed + drop_elements(o, dropout, options.generator), std::move(next)};
}

}  // namespace fastweights::nn
