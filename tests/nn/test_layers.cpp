#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <cmath>

#include "fastweights/nn/layers.hpp"
#include "numerics.hpp"
#include "small_model.hpp"

namespace fastweights::nn {
namespace {

using at::Tensor;
using test::error_ratio;
using test::small_config;

constexpr int64_t kTokens = 300;  // many windows of 16

/// Calls `step(x of a piece, position)` piece by piece and joins what it returns.
template <class Step>
Tensor in_pieces(const Tensor& x, int64_t piece, const Step& step) {
  std::vector<Tensor> parts;
  for (int64_t begin = 0; begin < x.size(1); begin += piece) {
    const auto position = at::full({x.size(0)}, begin, at::kLong);
    parts.push_back(step(x.narrow(1, begin, std::min(piece, x.size(1) - begin)), position));
  }
  return at::cat(parts, 1);
}

TEST_CASE("FastWeightMemory in pieces is one call") {
  torch::manual_seed(1);
  const int64_t piece = GENERATE(1, 7, 128, 1000);
  const bool in_place = GENERATE(false, true);
  const at::NoGradGuard no_grad;
  const FastWeightMemory memory(small_config());
  const auto x = at::randn({2, kTokens, 32});
  const auto whole = memory->forward(x, memory->initial_state(2));
  auto state = memory->initial_state(2);
  const auto o = in_pieces(x, piece, [&](const Tensor& part, const Tensor&) {
    auto result = memory->forward(part, state, in_place);
    state = result.state;
    return result.o;
  });
  CHECK(error_ratio(o, whole.o) < 1e-5);
  CHECK(error_ratio(state.state, whole.state.state) < 1e-5);
  CHECK(error_ratio(state.conv, whole.state.conv) < 1e-5);
}

TEST_CASE("SlidingWindowAttention in pieces is one call") {
  torch::manual_seed(2);
  const int64_t piece = GENERATE(1, 7, 128, 1000);
  const bool in_place = GENERATE(false, true);
  const at::NoGradGuard no_grad;
  const SlidingWindowAttention attention(small_config());
  const auto x = at::randn({2, kTokens, 32});
  const auto start = at::zeros({2}, at::kLong);
  const auto whole = attention->forward(x, attention->initial_state(2), start);
  auto state = attention->initial_state(2);
  const auto o = in_pieces(x, piece, [&](const Tensor& part, const Tensor& position) {
    auto result = attention->forward(part, state, position, in_place);
    state = result.state;
    return result.o;
  });
  CHECK(error_ratio(o, whole.o) < 1e-5);
  CHECK(error_ratio(state.key, whole.state.key) < 1e-5);
  CHECK(error_ratio(state.value, whole.state.value) < 1e-5);
}

TEST_CASE("gates start with half-lives spread over heads and layers") {
  auto config = small_config();
  config.half_life_min = 4.0;
  config.half_life_max = 8192.0;
  std::vector<double> half_lives;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const FastWeightMemory memory(config, layer);
    // g without an input: −exp(a_log) · softplus(dt_bias), with a_log = 0.
    const auto decay = at::softplus(memory->dt_bias.detach()).to(at::kDouble);
    CHECK(memory->a_log.eq(0).all().item<bool>());
    for (int64_t head = 0; head < config.memory_value_heads; ++head) {
      half_lives.push_back(std::log(2.0) / decay[head].item<double>());
    }
  }
  std::sort(half_lives.begin(), half_lives.end());
  CHECK_THAT(half_lives.front(), Catch::Matchers::WithinRel(4.0, 1e-3));
  CHECK_THAT(half_lives.back(), Catch::Matchers::WithinRel(8192.0, 1e-3));
  for (size_t i = 2; i < half_lives.size(); ++i) {
    const auto step = half_lives[i] / half_lives[i - 1];
    CHECK_THAT(step, Catch::Matchers::WithinRel(half_lives[1] / half_lives[0], 1e-3));
  }
}

TEST_CASE("delta_rule memories have no decay") {
  auto config = small_config();
  config.memory_rule = "delta_rule";
  const FastWeightMemory memory(config);
  for (const auto& item : memory->named_parameters()) {
    CHECK(item.key() != "decay.weight");
    CHECK(item.key() != "a_log");
    CHECK(item.key() != "dt_bias");
  }
  const auto result = memory->forward(at::randn({1, 5, 32}), memory->initial_state(1));
  CHECK(result.o.sizes() == at::IntArrayRef({1, 5, 32}));
}

TEST_CASE("a block is its branches, mixed") {
  torch::manual_seed(3);
  Block block(small_config());
  const at::NoGradGuard no_grad;
  block->mix_attention.uniform_();
  block->mix_memory.uniform_();
  const auto x = at::randn({2, 20, 32});
  const auto state = block->initial_state(2);
  const auto position = at::zeros({2}, at::kLong);
  const bool with_attention = GENERATE(false, true);
  const bool with_memory = GENERATE(false, true);
  block->attention_enabled = with_attention;
  block->memory_enabled = with_memory;

  const auto normed = block->mixer_norm->forward(x);
  auto mixed = x;
  if (with_attention) {
    const auto attention = block->attention->forward(normed, state.attention, position);
    mixed = mixed + block->mix_attention * attention.o;
  }
  if (with_memory) {
    mixed = mixed + block->mix_memory * block->memory->forward(normed, state.memory).o;
  }
  const auto expected =
      mixed + block->feed_forward->forward(block->feed_forward_norm->forward(mixed));
  const auto result = block->forward(x, state, position, {});
  CHECK(error_ratio(result.x, expected) < 1e-6);
  CHECK(result.state.memory.state.equal(state.memory.state) == !with_memory);
  CHECK(result.state.attention.key.equal(state.attention.key) == !with_attention);
}

TEST_CASE("SwiGLU and RMSNorm are their formulas") {
  torch::manual_seed(4);
  SwiGLU layer(small_config());
  const auto x = at::randn({2, 3, 32});
  const auto expected = layer->down(at::silu(layer->gate(x)) * layer->up(x));
  CHECK(error_ratio(layer->forward(x), expected) < 1e-6);
  const RMSNorm norm(32, 1e-6);
  CHECK(error_ratio(norm->forward(x), x * x.square().mean(-1, true).rsqrt()) < 1e-5);
}

}  // namespace
}  // namespace fastweights::nn
