#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fastweights/nn/language_model.hpp"
#include "fastweights/session/session.hpp"

// The fused kernels that a session writes with, against the modules.

using fastweights::Session;
using fastweights::nn::LanguageModelConfig;
using fastweights::nn::LanguageModelImpl;
using Model = std::shared_ptr<LanguageModelImpl>;

namespace {

LanguageModelConfig base_config() {
  LanguageModelConfig config;
  config.width = 64;
  config.layers = 2;
  config.feed_forward_width = 96;
  config.attention_heads = 2;
  config.attention_window = 16;
  config.memory_heads = 2;
  config.memory_value_heads = 2;
  config.memory_key_size = 16;
  config.memory_value_size = 32;
  config.half_life_max = 512.0;
  config.initializer_range = 0.2;  // so that every part has a say in the logits
  return config;
}

/// Sizes that fill no vector and divide no block.
LanguageModelConfig odd_config() {
  auto config = base_config();
  config.width = 60;
  config.feed_forward_width = 37;
  config.attention_heads = 3;
  config.attention_window = 5;
  config.attention_sinks = 3;
  config.memory_heads = 3;
  config.memory_value_heads = 3;
  config.memory_key_size = 13;
  config.memory_value_size = 7;
  config.convolution_size = 2;
  return config;
}

using Change = std::function<void(LanguageModelConfig&)>;

std::vector<std::pair<std::string, LanguageModelConfig>> configs() {
  std::vector<std::pair<std::string, LanguageModelConfig>> all{{"base", base_config()},
                                                               {"odd", odd_config()}};
  const auto add = [&](const char* name, const Change& change) {
    auto config = base_config();
    change(config);
    config.validate();
    all.emplace_back(name, config);
  };
  add("delta_rule", [](auto& c) { c.memory_rule = "delta_rule"; });
  add("beta to 2", [](auto& c) { c.beta_max = 2.0; });
  add("grouped value heads", [](auto& c) { c.memory_value_heads = 6; });
  add("untied embeddings", [](auto& c) { c.tie_embeddings = false; });
  add("no attention", [](auto& c) { c.attention = false; });
  add("no memory", [](auto& c) { c.memory = false; });
  add("no sinks, window of one", [](auto& c) { c.attention_sinks = 0, c.attention_window = 1; });
  add("one tap", [](auto& c) { c.convolution_size = 1; });
  add("fast head", [](auto& c) { c.fast_head = true, c.fast_head_half_life = 40.0; });
  add("fast head, odd width", [](auto& c) {
    c.fast_head = true, c.fast_head_eta = 2.0, c.width = 60, c.attention_heads = 3;
  });
  add("large", [](auto& c) {
    c.width = 192, c.feed_forward_width = 520, c.memory_key_size = 100, c.memory_value_size = 130;
  });
  return all;
}

Model make_model(const LanguageModelConfig& config, at::ScalarType type = at::kFloat) {
  torch::manual_seed(3);
  auto model = std::make_shared<LanguageModelImpl>(config);
  for (at::Tensor& parameter : model->parameters()) {
    parameter.requires_grad_(false);
    if (parameter.dim() == 1) parameter.add_(0.2 * at::randn_like(parameter));
  }
  model->to(type);
  model->eval();
  return model;
}

double error(const at::Tensor& value, const at::Tensor& exact) {
  const at::Tensor wide = exact.to(at::kDouble);
  return ((value.to(at::kDouble) - wide).norm() / wide.norm().clamp_min(1e-30)).item<double>();
}

struct Errors {
  double logits = 0.0;  // the worst of all steps
  double state = 0.0;   // the worst of all tensors
};

/// What a state of type bf16 keeps of one in fp32; the fast weights stay.
void round_state(fastweights::nn::LanguageModelState& state) {
  const auto round = [](at::Tensor& tensor) {
    if (tensor.defined()) tensor = tensor.to(at::kBFloat16).to(at::kFloat);
  };
  for (auto& block : state.blocks) {
    round(block.memory.conv);
    round(block.attention.key);
    round(block.attention.value);
  }
}

/// Writes with a session, and lets the modules of `exact` read the same bytes one by one, with
/// their state rounded to the session's type.
Errors compare(const Model& model, const LanguageModelImpl& exact, int tokens) {
  Session session(model);
  REQUIRE(session.fused());
  const at::NoGradGuard no_gradient;
  auto state = exact.initial_state(1);
  Errors errors;
  for (int i = 0; i < tokens; ++i) {
    const auto text = session.write({.max_tokens = 1, .temperature = 1.0});
    const auto token = static_cast<std::int64_t>(static_cast<unsigned char>(text[0]));
    auto output = exact.forward(at::tensor({token}).unsqueeze(0), state, {});
    state = output.state;
    if (model->norm->weight.scalar_type() == at::kBFloat16) round_state(state);
    errors.logits = std::max(errors.logits, error(session.logits(), output.logits.flatten()));
  }
  const auto mine = session.state();
  for (const auto& [name, tensor] : state.tensors()) {
    for (const auto& [other, value] : mine) {
      if (other == name) errors.state = std::max(errors.state, error(value, tensor));
    }
  }
  return errors;
}

struct Threads {
  explicit Threads(int count) : before(at::get_num_threads()) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before); }
  int before;
};

}  // namespace

TEST_CASE("a session writes as the modules would: fp32", "[decoder]") {
  for (const auto& [name, config] : configs()) {
    INFO(name);
    const auto model = make_model(config);
    const auto errors = compare(model, *model, 40);
    CHECK(errors.logits < 1e-5);
    CHECK(errors.state < 1e-5);
  }
}

TEST_CASE("a session writes as the modules would: weights in bf16", "[decoder]") {
  for (const auto& [name, config] : configs()) {
    INFO(name);
    const auto model = make_model(config, at::kBFloat16);
    // The same rounded weights in fp32.
    const auto exact = std::static_pointer_cast<LanguageModelImpl>(model->clone());
    exact->to(at::kFloat);
    exact->eval();
    const auto errors = compare(model, *exact, 40);
    CHECK(errors.logits < 5e-3);
    CHECK(errors.state < 5e-3);
  }
}

TEST_CASE("branches that are switched off stay off, and keep their state", "[decoder]") {
  for (const bool attention : {false, true}) {
    const auto model = make_model(base_config());
    model->enable_attention(attention);
    model->enable_memory(!attention);
    const auto errors = compare(model, *model, 20);
    CHECK(errors.logits < 1e-5);
    CHECK(errors.state < 1e-5);
  }
}

TEST_CASE("what is changed in a model is seen by the next token", "[decoder]") {
  const auto model = make_model(base_config());
  Session session(model);
  session.write({.max_tokens = 5});
  const auto compare_next = [&] {
    REQUIRE(session.fused());
    const auto before = session.state();
    fastweights::nn::NamedTensors tensors(before.begin(), before.end());
    std::erase_if(tensors, [](const auto& each) {
      return each.first == "logits" || each.first == "generator";
    });
    const auto state = fastweights::nn::LanguageModelState::from_tensors(tensors);
    const auto text = session.write({.max_tokens = 1});
    const auto token = static_cast<std::int64_t>(static_cast<unsigned char>(text[0]));
    const at::NoGradGuard no_gradient;
    const auto output = model->forward(at::tensor({token}).unsqueeze(0), state, {});
    CHECK(error(session.logits(), output.logits.flatten()) < 1e-5);
    const auto after = session.state();
    for (const auto& [name, tensor] : output.state.tensors()) {
      INFO(name);
      for (const auto& [other, value] : after) {
        if (other == name) CHECK(error(value, tensor) < 1e-5);
      }
    }
  };
  SECTION("a switch") {
    model->enable_memory(false);
    compare_next();
    model->enable_memory(true);
    model->blocks[1]->attention_enabled = false;
    compare_next();
    model->enable_attention(true);
    compare_next();
  }
  SECTION("a vector, in place") {
    const at::NoGradGuard no_gradient;
    model->norm->weight.mul_(-2.0);
    compare_next();
  }
  SECTION("a vector, by another tensor") {
    model->blocks[0]->memory->dt_bias.set_data(at::full_like(model->blocks[0]->memory->dt_bias, 3));
    compare_next();
  }
  SECTION("a matrix, by another tensor") {
    auto& weight = model->blocks[0]->feed_forward->up->weight;
    weight.set_data(at::randn_like(weight));
    compare_next();
  }
  SECTION("a module, by one that does not fit") {
    auto& up = model->blocks[0]->feed_forward->up;
    up = model->blocks[0]->feed_forward->replace_module(
        "up", torch::nn::Linear(torch::nn::LinearOptions(64, 96).bias(true)));
    CHECK_FALSE(session.fused());
    session.write({.max_tokens = 2});
  }
}

TEST_CASE("sessions on many threads ask for one model's kernels at once", "[decoder]") {
  const auto model = make_model(base_config());
  const auto run = [&](std::uint64_t seed) {
    at::set_num_threads(1);
    Session session(model, {.seed = seed});
    return session.write({.max_tokens = 40});
  };
  std::vector<std::string> together(6);
  std::vector<std::thread> workers;
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    workers.emplace_back([&, seed] { together[seed] = run(seed); });
  }
  for (std::thread& worker : workers) worker.join();
  const Threads restore(at::get_num_threads());
  for (std::uint64_t seed = 0; seed < 6; ++seed) CHECK(run(seed) == together[seed]);
}

TEST_CASE("a session writes the same bits on any number of threads", "[decoder]") {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const auto model = make_model(configs().back().second, type);
    const auto run = [&](int threads) {
      const Threads set(threads);
      Session session(model);
      session.write({.max_tokens = 30});
      return session.state();
    };
    const auto expected = run(1);
    for (const int threads : {2, 3}) {
      const auto got = run(threads);
      for (std::size_t i = 0; i < got.size(); ++i) {
        INFO(got[i].first);
        CHECK(at::equal(got[i].second, expected[i].second));
      }
    }
  }
}

TEST_CASE("a model whose modules were replaced is run by its modules", "[decoder]") {
  SECTION("by a projection with a bias") {
    const auto model = make_model(base_config());
    auto& up = model->blocks[0]->feed_forward->up;
    up = model->blocks[0]->feed_forward->replace_module(
        "up", torch::nn::Linear(torch::nn::LinearOptions(64, 96).bias(true)));
    Session session(std::const_pointer_cast<const LanguageModelImpl>(model));
    CHECK_FALSE(session.fused());
    CHECK(session.write({.max_tokens = 3}).size() == 3);
  }
  SECTION("by a wider feed-forward layer") {
    const auto model = make_model(base_config());
    auto wider = base_config();
    wider.feed_forward_width = 100;
    auto& layer = model->blocks[1]->feed_forward;
    layer = model->blocks[1]->replace_module("feed_forward", fastweights::nn::SwiGLU(wider));
    CHECK_FALSE(Session(std::const_pointer_cast<const LanguageModelImpl>(model)).fused());
  }
  SECTION("in fp64") { CHECK_FALSE(Session(make_model(base_config(), at::kDouble)).fused()); }
  SECTION("in two types") {
    const auto model = make_model(base_config());
    model->norm->to(at::kBFloat16);
    CHECK_FALSE(Session(std::const_pointer_cast<const LanguageModelImpl>(model)).fused());
  }
  CHECK(Session(make_model(base_config())).fused());
}
