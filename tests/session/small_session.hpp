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

/// ‖a − b‖ / ‖b‖.
inline double distance(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).norm() / b.norm()).item<double>();
}

/// A tensor of a session's state, or an undefined one.
inline at::Tensor tensor_of(const Session& session, const std::string& name) {
  for (auto& [key, tensor] : session.state()) {
    if (key == name) return tensor;
  }
  return {};
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

/// What makes a session must be model, options and log alone, whatever becomes of the log and
/// wherever it has been kept.
inline void check_is_function_of_log(const Model& model, const SessionOptions& options) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "state";
  const auto check_same = [](const Session& a, const Session& b) {
    CHECK(same_bits(a, b));
    CHECK(a.report().limited_writes == b.report().limited_writes);
    CHECK(a.report().capped_norms == b.report().capped_norms);
    CHECK(a.report().refused_writes == b.report().refused_writes);
  };
  Session session(model, options);
  session.read(noise(50));
  session.write({.max_tokens = 70, .seed = 5, .ahead = 4});
  const Mark mark = session.mark();
  session.read(noise(30, 2));
  session.feedback(20, 60, 1.5F);
  session.revoke(5, 12);
  check_same(session, Session::from_log(model, session.log(), options));

  session.save(path);
  Session loaded = Session::load(path, model);
  CHECK(loaded.options().policy == options.policy);
  CHECK(loaded.options().end_to_end == options.end_to_end);
  REQUIRE(bool(loaded.options().protection) == bool(options.protection));
  if (options.protection) CHECK(*loaded.options().protection == *options.protection);
  check_same(loaded, session);
  Session fork = session;
  fork.read(noise(40, 3));
  CHECK_FALSE(same_bits(fork, session));
  for (Session* each : {&session, &loaded}) {
    each->rollback(mark);
    each->write({.max_tokens = 21, .seed = 6});
  }
  check_same(loaded, session);
  check_same(session, Session::from_log(model, session.log(), options));

  session.commit();
  session.read(noise(9, 3));
  session.save(path);
  Session after = Session::load(path, model);
  check_same(after, session);
  for (Session* each : {&session, &after}) each->rollback(each->log().start());
  check_same(after, session);
}

}  // namespace fastweights::test
