#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/nn/model_folder.hpp"
#include "file_fixture.hpp"
#include "numerics.hpp"
#include "pieces.hpp"
#include "small_model.hpp"

namespace fastweights::nn {
namespace {

using at::Tensor;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;
using test::check_close;
using test::error_ratio;
using test::gradients_in_pieces;
using test::random_tokens;
using test::read_in_pieces;
using test::small_config;
using test::small_model;

LanguageModelConfig head_config() {
  auto config = small_config();
  config.fast_head = true;
  config.fast_head_half_life = 100.0;
  return config;
}

TEST_CASE("fast head: a text in pieces of any size is a text in one call") {
  const int64_t piece = GENERATE(1, 7, 128);
  const bool in_place = GENERATE(false, true);
  const bool strengths = GENERATE(false, true);
  CAPTURE(piece, in_place, strengths);
  const at::NoGradGuard no_grad;
  auto model = small_model(head_config());
  const auto tokens = random_tokens(2, 300);
  ForwardOptions options;
  options.in_place = in_place;
  if (strengths) options.write_strength = at::randint(0, 3, {2, 300}).to(at::kFloat);
  auto given = options;
  given.in_place = false;
  const auto whole = model->forward(tokens, model->initial_state(2), given);
  auto state = model->initial_state(2);
  const auto logits = read_in_pieces(*model, tokens, piece, state, options);
  CHECK(error_ratio(logits, whole.logits) < 1e-5);
  check_close(state, whole.state);
  for (const auto& [name, tensor] : state.tensors()) {
    CAPTURE(name);
    CHECK(tensor.storage().nbytes() == tensor.nbytes());  // no view of something larger
  }
}

/// The head of one row, token by token in fp64, over the logits of the model without it.
Tensor by_definition(const LanguageModelImpl& model, const LanguageModelImpl& plain,
                     const Tensor& tokens, const Tensor& strength) {
  const auto& config = model.config();
  ForwardOptions options;
  options.write_strength = strength;
  const auto raw = plain.forward(tokens, plain.initial_state(1), options).logits[0];
  // Tied embeddings: the hidden states are the solution of hidden · embeddingᵀ = logits.
  const auto embedding = plain.embedding->weight.to(at::kDouble);
  const auto hidden = std::get<0>(at::linalg_lstsq(embedding, raw.t())).t();
  auto F = at::zeros({config.width, config.vocabulary_size}, at::kDouble);
  std::vector<Tensor> rows;
  for (int64_t t = 0; t < tokens.size(1); ++t) {
    const auto key = hidden[t] / hidden[t].norm();
    rows.push_back(raw[t] + at::matmul(key, F));
    if (t + 1 == tokens.size(1)) break;
    const double r = strength.defined() ? strength[0][t + 1].item<double>() : 1.0;
    auto error = -rows.back().softmax(0);
    error[tokens[0][t + 1].item<int64_t>()] += 1.0;
    const double decay = std::exp(std::min(r, 1.0) * config.fast_head_decay());
    F = decay * F + std::min(config.fast_head_eta * r, 2.0) * at::outer(key, error);
  }
  return at::stack(rows);
}

TEST_CASE("fast head: logits and strengths against the definition") {
  const bool strengths = GENERATE(false, true);
  const at::NoGradGuard no_grad;
  auto config = head_config();
  config.fast_head_eta = 1.5;
  auto model = small_model(config);
  auto without = config;
  without.fast_head = false;
  auto plain = small_model(without);
  model->to(at::kDouble);
  plain->to(at::kDouble);
  const auto tokens = random_tokens(1, 60);
  ForwardOptions options;
  options.limited_writes = at::zeros({1}, at::kLong);
  if (strengths) options.write_strength = at::rand({1, 60}) * 2.0;
  const auto logits = model->forward(tokens, model->initial_state(1), options).logits[0];
  CHECK(error_ratio(logits, by_definition(*model, *plain, tokens, options.write_strength)) < 1e-7);
  if (!strengths) return;
  const auto over = (options.write_strength * 1.5).gt(2.0).sum().item<int64_t>();
  CHECK(over > 0);
  CHECK(options.limited_writes.item<int64_t>() >= over);
}

TEST_CASE("fast head: strength one changes no bit, strength zero leaves the state as it was") {
  const at::NoGradGuard no_grad;
  auto model = small_model(head_config());
  const auto state = model->forward(random_tokens(2, 30), model->initial_state(2)).state;
  const auto tokens = random_tokens(2, 40);
  ForwardOptions options;
  options.write_strength = at::ones({2, 40});
  const auto plain = model->forward(tokens, state);
  const auto one = model->forward(tokens, state, options);
  CHECK(one.logits.equal(plain.logits));
  CHECK(one.state.head.state.equal(plain.state.head.state));
  options.write_strength = at::zeros({2, 40});
  CHECK(model->forward(tokens, state, options).state.head.state.equal(state.head.state));
}

TEST_CASE("fast head: the state has its names, goes through them and is checked") {
  const at::NoGradGuard no_grad;
  auto model = small_model(head_config());
  const auto state = model->forward(random_tokens(2, 30), model->initial_state(2)).state;
  const auto tensors = state.tensors();
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors) names.push_back(name);
  REQUIRE(names.size() == 12);
  CHECK(std::vector<std::string>(names.end() - 4, names.end()) ==
        std::vector<std::string>{"head.state", "head.hidden", "head.logits", "position"});
  check_close(LanguageModelState::from_tensors(tensors), state);
  CHECK(state.bytes() == model->state_bytes(2));
  const auto reset = state.reset_rows(torch::tensor({true, false}));
  CHECK(reset.head.state[0].count_nonzero().item<int64_t>() == 0);
  CHECK(reset.head.state[1].equal(state.head.state[1]));
  auto plain = small_model();
  CHECK_THROWS_MATCHES(plain->forward(random_tokens(2, 3), state), StateMismatch,
                       MessageMatches(ContainsSubstring("head.state must be none")));
  auto cut = state;
  cut.head.hidden = cut.head.hidden.narrow(1, 0, 5);
  CHECK_THROWS_MATCHES(model->forward(random_tokens(2, 3), cut), StateMismatch,
                       MessageMatches(ContainsSubstring("head.hidden must be [2, 32]")));
}

TEST_CASE("fast head: gradients of a text in two pieces are those of one call") {
  auto model = small_model(head_config());
  model->to(at::kDouble);
  const auto tokens = random_tokens(2, 40);
  const auto whole = gradients_in_pieces(*model, tokens, 40);
  check_close(gradients_in_pieces(*model, tokens, 13), whole, 1e-10);
}

TEST_CASE("fast head: options leave logits out") {
  const at::NoGradGuard no_grad;
  auto model = small_model(head_config());
  const auto tokens = random_tokens(2, 9);
  const auto all = model->forward(tokens, model->initial_state(2));
  ForwardOptions last;
  last.last_logits_only = true;
  const auto one = model->forward(tokens, model->initial_state(2), last);
  CHECK(one.logits.equal(all.logits.narrow(1, 8, 1)));
  ForwardOptions none;
  none.logits = false;
  const auto state_only = model->forward(tokens, model->initial_state(2), none);
  CHECK_FALSE(state_only.logits.defined());
  check_close(state_only.state, all.state);
}

TEST_CASE("fast head: a trained model gets one when it is loaded, a folder keeps it") {
  const test::TemporaryFolder folder;
  auto model = small_model();
  save_model(folder.path(), *model);
  const auto loaded = load_model(folder.path(), at::kFloat, [](LanguageModelConfig& config) {
    config.fast_head = true;
    config.fast_head_eta = 0.25;
  });
  CHECK(loaded->config().fast_head);
  CHECK(loaded->initial_state(1).head.state.defined());
  save_model(folder.path() / "again", *loaded);
  CHECK(load_model(folder.path() / "again")->config().fast_head_eta == 0.25);
  CHECK_FALSE(load_model(folder.path())->config().fast_head);
  CHECK_THROWS_AS(load_model(folder.path(), at::kFloat,
                             [](LanguageModelConfig& config) {
                               config.fast_head_eta = 3.0;
                               config.fast_head = true;
                             }),
                  Error);
}

TEST_CASE("fast head: configurations") {
  const auto config = LanguageModelConfig::from_json(
      R"({"fast_head": true, "fast_head_eta": 0.5, "fast_head_half_life": 10})");
  CHECK(config.fast_head_eta == 0.5);
  CHECK(std::exp(10.0 * config.fast_head_decay()) == Catch::Approx(0.5));
  CHECK(LanguageModelConfig::from_json(config.to_json()) == config);
  CHECK(LanguageModelConfig{}.fast_head_decay() == 0.0);
  const auto changed = config.with(R"({"fast_head_eta": 0.1})");
  CHECK(changed.fast_head_eta == 0.1);
  CHECK(changed.fast_head);
  CHECK_THROWS_MATCHES(config.with(R"({"fast_head_eta": 2.5})"), Error,
                       MessageMatches(ContainsSubstring("fast_head_eta must be from 0.0 to 2.0")));
  CHECK_THROWS_MATCHES(config.with(R"({"fast_head_half_life": -1})"), Error,
                       MessageMatches(ContainsSubstring("fast_head_half_life must be from 0.0")));
}

}  // namespace
}  // namespace fastweights::nn
