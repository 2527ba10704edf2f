#pragma once

#include <sys/resource.h>
#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <csignal>
#include <cstdint>
#include <memory>
#include <string>

#include "fastweights/nn/language_model.hpp"
#include "fastweights/session/session.hpp"
#include "file_fixture.hpp"

namespace fastweights::test {

using Model = std::shared_ptr<const nn::LanguageModelImpl>;

inline nn::LanguageModelConfig small_config() {
  nn::LanguageModelConfig config;
  config.width = 32;
  config.layers = 2;
  config.feed_forward_width = 64;
  config.attention_heads = 2;
  config.attention_window = 16;
  config.memory_heads = 2;
  config.memory_value_heads = 2;
  config.memory_key_size = 16;
  config.memory_value_size = 16;
  config.initializer_range = 0.3;  // so that predictions are far from uniform
  return config;
}

inline Model random_model(std::uint64_t seed = 1,
                          const nn::LanguageModelConfig& config = small_config()) {
  torch::manual_seed(seed);
  auto model = std::make_shared<nn::LanguageModelImpl>(config);
  model->eval();
  for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  return model;
}

/// Bytes of all values, without a pattern that a model could know.
inline std::string noise(std::size_t size, std::uint32_t seed = 1) {
  std::string text;
  for (std::uint32_t x = seed; text.size() < size;) {
    x = x * 1664525U + 1013904223U;
    text += static_cast<char>(x >> 24);
  }
  return text;
}

inline bool same_bits(const Session& a, const Session& b) {
  const auto left = a.state();
  const auto right = b.state();
  return std::ranges::equal(left, right, [](const auto& x, const auto& y) {
    return x.first == y.first && x.second.dtype() == y.second.dtype() &&
           at::equal(x.second, y.second);
  });
}

/// Models of this size run best on one thread.
struct OneThread {
  OneThread() { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(before); }
  int before = at::get_num_threads();
};

/// While it lives, files of this process cannot grow beyond `bytes`, as on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    old_handler_ = std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old_limit_);
    const rlimit limit{bytes, old_limit_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &old_limit_);
    std::signal(SIGXFSZ, old_handler_);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  rlimit old_limit_{};
  void (*old_handler_)(int) = nullptr;
};

}  // namespace fastweights::test
