#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <string>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/nn/state.hpp"
#include "small_model.hpp"

namespace fastweights::nn {
namespace {

using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;

std::vector<std::string> names_of(const LanguageModelState& state) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : state.tensors()) names.push_back(name);
  return names;
}

LanguageModelState state_after_reading(int64_t batch, int64_t tokens) {
  const at::NoGradGuard no_grad;
  auto model = test::small_model();
  return model->forward(test::random_tokens(batch, tokens), model->initial_state(batch)).state;
}

TEST_CASE("a state names its tensors, and can be made from them in any order") {
  const auto state = state_after_reading(2, 40);
  CHECK(names_of(state) ==
        std::vector<std::string>{"layers.0.memory.state", "layers.0.memory.conv",
                                 "layers.0.attention.key", "layers.0.attention.value",
                                 "layers.1.memory.state", "layers.1.memory.conv",
                                 "layers.1.attention.key", "layers.1.attention.value", "position"});
  auto shuffled = state.tensors();
  std::reverse(shuffled.begin(), shuffled.end());
  const auto again = LanguageModelState::from_tensors(shuffled);
  CHECK(names_of(again) == names_of(state));
  const auto expected = state.tensors();
  const auto tensors = again.tensors();
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(tensors[i].second.is_same(expected[i].second));
  }
}

TEST_CASE("a state has no tensors of branches that its model lacks") {
  auto config = test::small_config();
  config.attention = false;
  CHECK(names_of(test::small_model(config)->initial_state(1)) ==
        std::vector<std::string>{"layers.0.memory.state", "layers.0.memory.conv",
                                 "layers.1.memory.state", "layers.1.memory.conv", "position"});
}

TEST_CASE("from_tensors refuses what is no state") {
  const auto good = state_after_reading(1, 3).tensors();
  const auto refuses = [&](NamedTensors tensors, const char* text) {
    CHECK_THROWS_MATCHES(LanguageModelState::from_tensors(tensors), StateMismatch,
                         MessageMatches(ContainsSubstring(text)));
  };
  const auto with = [&](const char* name) {
    auto tensors = good;
    tensors.emplace_back(name, at::zeros({1}));
    return tensors;
  };
  refuses(with("layers.0.memory.sate"), "unknown tensor \"layers.0.memory.sate\"");
  refuses(with("layers.-1.memory.state"), "unknown tensor");
  refuses(with("layers.99999999999999999999.memory.state"), "unknown tensor");
  refuses(with("layers.9999999.memory.state"), "unknown tensor");
  refuses(with("layers.1"), "unknown tensor");
  refuses(with("layers."), "unknown tensor");
  refuses(with("position"), "tensor \"position\" appears twice");
  refuses(NamedTensors(good.begin(), good.end() - 1), "tensor \"position\" is missing");
}

TEST_CASE("reset_rows starts rows anew and leaves the others") {
  const auto state = state_after_reading(3, 40);
  const auto reset = state.reset_rows(torch::tensor({false, true, false}));
  const auto fresh = test::small_model()->initial_state(3).tensors();
  const auto before = state.tensors();
  const auto after = reset.tensors();
  for (size_t i = 0; i < before.size(); ++i) {
    CAPTURE(before[i].first);
    CHECK(after[i].second[1].equal(fresh[i].second[1]));
    CHECK(after[i].second[0].equal(before[i].second[0]));
    CHECK(after[i].second[2].equal(before[i].second[2]));
  }
  CHECK(state.position.equal(at::full({3}, 40, at::kLong)));
  CHECK_THROWS_MATCHES(state.reset_rows(torch::tensor({true})), ShapeError,
                       MessageMatches(ContainsSubstring("mask must be bool [B] = [3]")));
}

TEST_CASE("detach cuts the graph, clone copies, bytes counts") {
  auto model = test::small_model();
  const auto state = model->forward(test::random_tokens(2, 5), model->initial_state(2)).state;
  CHECK(state.blocks[0].memory.state.requires_grad());
  CHECK_FALSE(state.detach().blocks[0].memory.state.requires_grad());
  const auto copy = state.clone();
  CHECK_FALSE(copy.position.is_alias_of(state.position));
  int64_t bytes = 0;
  for (const auto& [name, tensor] : state.tensors())
    bytes += tensor.numel() * tensor.element_size();
  CHECK(state.bytes() == bytes);
  CHECK(model->state_bytes(2) == bytes);
}

}  // namespace
}  // namespace fastweights::nn
