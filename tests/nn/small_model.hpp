#pragma once

#include <torch/torch.h>

#include "fastweights/nn/language_model.hpp"

namespace fastweights::test {

/// A model small enough to run in milliseconds, with a window far shorter than the texts of the
/// tests.
inline nn::LanguageModelConfig small_config() {
  nn::LanguageModelConfig config;
  config.width = 32;
  config.layers = 2;
  config.feed_forward_width = 48;
  config.attention_heads = 2;
  config.attention_window = 16;
  config.memory_heads = 2;
  config.memory_value_heads = 4;
  config.memory_key_size = 12;
  config.memory_value_size = 20;
  config.half_life_max = 512.0;
  config.initializer_range = 0.2;  // so that every part has a say in the logits
  return config;
}

inline nn::LanguageModel small_model(const nn::LanguageModelConfig& config = small_config()) {
  torch::manual_seed(7);
  return nn::LanguageModel(config);
}

inline at::Tensor random_tokens(int64_t batch, int64_t tokens) {
  return at::randint(256, {batch, tokens}, at::kLong);
}

}  // namespace fastweights::test
