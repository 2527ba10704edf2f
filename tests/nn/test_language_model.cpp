#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <set>
#include <string>
#include <thread>

#include "fastweights/core/error.hpp"
#include "fastweights/nn/language_model.hpp"
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

TEST_CASE("a text in pieces of any size is a text in one call") {
  const int64_t piece = GENERATE(1, 7, 128, 1000);
  const bool in_place = GENERATE(false, true);
  CAPTURE(piece, in_place);
  const at::NoGradGuard no_grad;
  auto model = small_model();
  const auto tokens = random_tokens(2, 1100);
  const auto whole = model->forward(tokens, model->initial_state(2));
  auto state = model->initial_state(2);
  const auto logits = read_in_pieces(*model, tokens, piece, state, {.in_place = in_place});
  CHECK(error_ratio(logits, whole.logits) < 1e-5);
  check_close(state, whole.state);
}

TEST_CASE("rows at different positions, and rows that were reset, read as if alone") {
  const int64_t piece = GENERATE(1, 7, 50, 200);
  CAPTURE(piece);
  const at::NoGradGuard no_grad;
  auto model = small_model();
  const auto past = random_tokens(3, 90);
  auto state = model->forward(past, model->initial_state(3)).state;
  state = state.reset_rows(torch::tensor({false, true, false}));
  const auto tokens = random_tokens(3, 200);
  const auto logits = read_in_pieces(*model, tokens, piece, state);
  for (int64_t row = 0; row < 3; ++row) {
    const auto text = row == 1 ? tokens[row] : at::cat({past[row], tokens[row]});
    const auto alone = model->forward(text.unsqueeze(0), model->initial_state(1)).logits;
    CHECK(error_ratio(logits[row], alone[0].slice(0, alone.size(1) - 200)) < 1e-5);
  }
  CHECK(state.position.equal(at::tensor({int64_t{290}, int64_t{200}, int64_t{290}})));
}

TEST_CASE("reading goes on alike ten million tokens in") {
  const at::NoGradGuard no_grad;
  auto model = small_model();
  const auto tokens = random_tokens(2, 300);
  auto start = model->initial_state(2);
  start.position.fill_(10'000'000);
  // What stands in the rings of a text that long; here zeros.
  const auto whole = model->forward(tokens, start);
  auto state = start.clone();
  CHECK(error_ratio(read_in_pieces(*model, tokens, 7, state), whole.logits) < 1e-5);
  check_close(state, whole.state);
}

TEST_CASE("the state does not grow with the text") {
  const at::NoGradGuard no_grad;
  auto model = small_model();
  const auto bytes = model->state_bytes(2);
  auto state = model->initial_state(2);
  for (const int64_t tokens : {0, 1, 5, 100, 1000}) {
    state = model->forward(random_tokens(2, tokens), state).state;
    CHECK(state.bytes() == bytes);
    for (const auto& [name, tensor] : state.tensors()) {
      CAPTURE(name, tokens);
      // Nothing longer is kept alive behind a view.
      CHECK(tensor.storage().nbytes() == tensor.nbytes());
    }
  }
}

TEST_CASE("no tokens change nothing") {
  const at::NoGradGuard no_grad;
  const bool in_place = GENERATE(false, true);
  auto model = small_model();
  const auto state = model->forward(random_tokens(2, 30), model->initial_state(2)).state;
  const auto before = state.clone();
  ForwardOptions options;
  options.in_place = in_place;
  const auto output = model->forward(random_tokens(2, 0), state, options);
  CHECK(output.logits.sizes() == at::IntArrayRef({2, 0, 256}));
  const auto after = output.state.tensors();
  const auto expected = before.tensors();
  for (size_t i = 0; i < after.size(); ++i) CHECK(after[i].second.equal(expected[i].second));
  options.last_logits_only = true;
  CHECK(model->forward(random_tokens(2, 0), state, options).logits.size(1) == 0);
}

TEST_CASE("a forward call leaves the state it was given as it was") {
  const at::NoGradGuard no_grad;
  auto model = small_model();
  const auto state = model->forward(random_tokens(2, 30), model->initial_state(2)).state;
  const auto before = state.clone().tensors();
  const int64_t tokens = GENERATE(1, 40);
  model->forward(random_tokens(2, tokens), state);
  const auto after = state.tensors();
  for (size_t i = 0; i < after.size(); ++i) CHECK(after[i].second.equal(before[i].second));
}

TEST_CASE("options leave logits out") {
  const at::NoGradGuard no_grad;
  auto model = small_model();
  const auto tokens = random_tokens(2, 9);
  const auto all = model->forward(tokens, model->initial_state(2));
  ForwardOptions last;
  last.last_logits_only = true;
  const auto one = model->forward(tokens, model->initial_state(2), last);
  CHECK(one.logits.sizes() == at::IntArrayRef({2, 1, 256}));
  CHECK(error_ratio(one.logits, all.logits.narrow(1, 8, 1)) < 1e-6);
  ForwardOptions none;
  none.logits = false;
  const auto state_only = model->forward(tokens, model->initial_state(2), none);
  CHECK_FALSE(state_only.logits.defined());
  check_close(state_only.state, all.state);
}

TEST_CASE("every parameter gets a gradient, and gradients flow through the state") {
  auto config = small_config();
  config.memory_rule = GENERATE("gated_delta_rule", "delta_rule");
  config.tie_embeddings = GENERATE(true, false);
  auto model = small_model(config);
  const auto first = model->forward(random_tokens(2, 40), model->initial_state(2));
  const auto second = model->forward(random_tokens(2, 40), first.state);
  second.logits.logsumexp(-1).mean().backward();
  for (const auto& item : model->named_parameters()) {
    CAPTURE(item.key());
    REQUIRE(item.value().grad().defined());
    CHECK(item.value().grad().isfinite().all().item<bool>());
    CHECK(item.value().grad().abs().max().item<float>() > 0.0F);
  }
}

TEST_CASE("gradients of a text in two pieces are those of one call") {
  auto model = small_model();
  model->to(at::kDouble);
  const auto tokens = random_tokens(2, 60);
  const auto whole = gradients_in_pieces(*model, tokens, 60);
  check_close(gradients_in_pieces(*model, tokens, 23), whole, 1e-10);
}

TEST_CASE("under autocast logits and fast weights are fp32 and near those of fp32") {
  auto model = small_model();
  const auto tokens = random_tokens(2, 100);
  const auto exact = model->forward(tokens, model->initial_state(2));
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto output = model->forward(tokens, model->initial_state(2));
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  output.logits.logsumexp(-1).mean().backward();
  CHECK(output.logits.scalar_type() == at::kFloat);
  CHECK(error_ratio(output.logits, exact.logits) < 5e-2);
  for (const auto& [name, tensor] : output.state.tensors()) {
    CAPTURE(name);
    CHECK(tensor.scalar_type() == (name == "position" ? at::kLong : at::kFloat));
  }
  for (const auto& item : model->named_parameters()) {
    CHECK(item.value().grad().scalar_type() == at::kFloat);
  }
}

TEST_CASE("one model serves several threads at once") {
  auto model = small_model();
  const auto text = random_tokens(4, 200);
  std::vector<Tensor> alone(4);
  std::vector<Tensor> together(4);
  const auto read = [&](int64_t row, Tensor& out) {
    const at::NoGradGuard no_grad;
    auto state = model->initial_state(1);
    out = read_in_pieces(*model, text.narrow(0, row, 1), 9, state, {.in_place = true});
  };
  for (int64_t row = 0; row < 4; ++row) read(row, alone[row]);
  std::vector<std::thread> threads;
  for (int64_t row = 0; row < 4; ++row) {
    threads.emplace_back([&, row] { read(row, together[row]); });
  }
  for (auto& thread : threads) thread.join();
  for (int64_t row = 0; row < 4; ++row) CHECK(together[row].equal(alone[row]));
}

TEST_CASE("a dropped row trains as without its memory") {
  auto config = small_config();
  config.memory_dropout = 1.0;
  auto model = small_model(config);
  const auto tokens = random_tokens(2, 50);
  const auto dropped = model->forward(tokens, model->initial_state(2)).logits;
  model->eval();
  const auto with_memory = model->forward(tokens, model->initial_state(2)).logits;
  model->enable_memory(false);
  const auto without = model->forward(tokens, model->initial_state(2)).logits;
  CHECK(error_ratio(dropped, without) < 1e-6);
  CHECK(error_ratio(with_memory, without) > 1e-2);
}

TEST_CASE("dropout is drawn in training only, from the generator that is given") {
  auto config = small_config();
  auto plain = small_model(config);
  config.dropout = 0.3;
  auto model = small_model(config);
  const at::NoGradGuard no_grad;
  const auto tokens = random_tokens(2, 50);
  const auto read = [&](std::uint64_t seed) {
    return model
        ->forward(tokens, model->initial_state(2),
                  {.generator = at::detail::createCPUGenerator(seed)})
        .logits;
  };
  const auto one = read(1);
  CHECK(read(1).equal(one));
  CHECK_FALSE(read(2).equal(one));
  model->eval();
  const auto evaluated = model->forward(tokens, model->initial_state(2)).logits;
  CHECK(evaluated.equal(plain->forward(tokens, plain->initial_state(2)).logits));
  CHECK(error_ratio(one, evaluated) > 1e-2);
}

TEST_CASE("dropout keeps the mean of what it drops") {
  auto config = small_config();
  config.layers = 1;
  config.dropout = 0.3;
  auto model = small_model(config);
  const at::NoGradGuard no_grad;
  // Without branches what is left is the embedding, before a norm that hides its length.
  const auto& block = model->blocks[0];
  block->mix_attention.zero_();
  block->mix_memory.zero_();
  block->feed_forward->down->weight.zero_();
  block->feed_forward_norm->weight.fill_(1.0);
  at::Tensor seen;
  const auto tokens = at::zeros({1, 20000}, at::kLong);
  model->forward(tokens, model->initial_state(1),
                 {.generator = at::detail::createCPUGenerator(5),
                  .last_feed_forward = [&](const at::Tensor& x) { return seen = x; }});
  const auto share = (seen == 0).to(at::kFloat).mean().item<double>();
  CHECK(std::abs(share - 0.3) < 0.01);
  const auto embedding = model->embedding->weight[0];
  CHECK(error_ratio(seen.mean(at::IntArrayRef{0, 1}), embedding) < 0.02);
}

TEST_CASE("dropout reaches what each branch adds") {
  const int branch = GENERATE(0, 1, 2);
  auto config = small_config();
  config.dropout = 0.3;
  auto model = small_model(config);
  const at::NoGradGuard no_grad;
  auto& block = model->blocks[0];
  if (branch != 0) block->mix_attention.zero_();
  if (branch != 1) block->mix_memory.zero_();
  if (branch != 2) block->feed_forward->down->weight.zero_();
  const auto x = at::randn({2, 300, config.width});
  const auto state = block->initial_state(2);
  const auto position = at::zeros({2}, at::kLong);
  const auto added = [&] {
    return block->forward(x, state, position, {.generator = at::detail::createCPUGenerator(3)}).x -
           x;
  };
  const auto dropped = added();
  block->eval();
  const auto all = added();
  const auto gone = (dropped == 0).logical_and(all != 0);
  const auto share = gone.sum().item<double>() / (all != 0).sum().item<double>();
  CAPTURE(branch);
  CHECK(std::abs(share - 0.3) < 0.02);
  CHECK(error_ratio(dropped * 0.7, all.masked_fill(gone, 0)) < 1e-4);
}

TEST_CASE("write strengths reach every memory, row by row and token by token") {
  auto model = small_model();
  model->eval();
  const at::NoGradGuard no_grad;
  const auto tokens = random_tokens(3, 40);
  auto before = model->initial_state(3);
  before = model->forward(random_tokens(3, 40), before).state;
  const auto plain = model->forward(tokens, before);
  auto strength = at::ones({3, 40});
  const auto one = model->forward(tokens, before, {.write_strength = strength});
  CHECK(one.logits.equal(plain.logits));
  strength[1].fill_(0.0);
  strength[2].slice(0, 20).fill_(2.0);
  const auto limited = at::zeros({1}, at::kLong);
  const auto changed =
      model->forward(tokens, before, {.write_strength = strength, .limited_writes = limited});
  CHECK(changed.logits[0].equal(plain.logits[0]));
  CHECK_FALSE(changed.logits[1].equal(plain.logits[1]));
  CHECK(error_ratio(changed.logits[2].slice(0, 0, 20), plain.logits[2].slice(0, 0, 20)) < 1e-6);
  CHECK(error_ratio(changed.logits[2].slice(0, 20), plain.logits[2].slice(0, 20)) > 1e-3);
  CHECK(limited.item<int64_t>() == 0);  // beta_max is 1
  for (std::size_t layer = 0; layer < before.blocks.size(); ++layer) {
    const auto& old = before.blocks[layer].memory;
    const auto& now = changed.state.blocks[layer].memory;
    CHECK(now.state[0].equal(plain.state.blocks[layer].memory.state[0]));
    CHECK(now.state[1].equal(old.state[1]));
    CHECK_FALSE(now.conv[1].equal(old.conv[1]));  // what was read went by
  }
  CHECK_THROWS_AS(model->forward(tokens, before, {.write_strength = at::ones({3, 39})}),
                  fastweights::ShapeError);
  CHECK_THROWS_AS(
      model->forward(tokens, before, {.write_strength = at::ones({3, 40}, at::kDouble)}),
      fastweights::ShapeError);
}

TEST_CASE("dropping is drawn per row, for all blocks at once") {
  auto config = small_config();
  config.memory_dropout = 0.5;
  auto model = small_model(config);
  const auto tokens = random_tokens(1, 30).expand({64, 30});
  const auto logits = model->forward(tokens, model->initial_state(64)).logits;
  std::set<float> kinds;
  for (int64_t row = 0; row < 64; ++row) kinds.insert(logits[row].abs().sum().item<float>());
  CHECK(kinds.size() == 2);
}

TEST_CASE("ablated branches are left out") {
  const at::NoGradGuard no_grad;
  auto model = small_model();
  const auto tokens = random_tokens(1, 50);
  const auto all = model->forward(tokens, model->initial_state(1)).logits;
  model->enable_attention(false);
  const auto memory_only = model->forward(tokens, model->initial_state(1)).logits;
  model->enable_attention(true);
  CHECK(model->forward(tokens, model->initial_state(1)).logits.equal(all));
  CHECK(error_ratio(memory_only, all) > 1e-2);
}

TEST_CASE("parameters start as stated and are counted") {
  LanguageModelConfig config;
  torch::manual_seed(1);
  const LanguageModel model(config);
  const int64_t attention = 4 * 256 * 256 + 4 * 32 + 4 * 64;
  const int64_t memory = 5 * 256 * 256 + 2 * 4 * 256 + 768 * 4 + 2 * 4 + 64;
  const int64_t block = attention + memory + 3 * 256 * 704 + 4 * 256;
  CHECK(model->parameter_count() == 256 * 256 + 4 * block + 256);
  const auto deviation = [&](const Tensor& weight) { return weight.std().item<double>(); };
  const auto residual = 0.02 / std::sqrt(8.0);
  const auto& first = model->blocks[0];
  using Catch::Matchers::WithinRel;
  CHECK_THAT(deviation(model->embedding->weight), WithinRel(0.02, 0.02));
  CHECK_THAT(deviation(first->feed_forward->gate->weight), WithinRel(0.02, 0.02));
  CHECK_THAT(deviation(first->feed_forward->down->weight), WithinRel(residual, 0.02));
  CHECK_THAT(deviation(first->attention->output->weight), WithinRel(residual, 0.02));
  CHECK_THAT(deviation(first->memory->output->weight), WithinRel(residual, 0.02));
  CHECK_THAT(deviation(first->memory->convolution_weight), WithinRel(0.5 / std::sqrt(3.0), 0.02));
  CHECK(first->mix_memory.eq(1).all().item<bool>());
}

TEST_CASE("parameter names are those of the model file") {
  auto config = small_config();
  config.tie_embeddings = false;
  config.layers = 1;
  std::set<std::string> names;
  for (const auto& item : small_model(config)->named_parameters()) names.insert(item.key());
  CHECK(names == std::set<std::string>{"embedding.weight",
                                       "blocks.0.mixer_norm.weight",
                                       "blocks.0.attention.query.weight",
                                       "blocks.0.attention.key.weight",
                                       "blocks.0.attention.value.weight",
                                       "blocks.0.attention.output.weight",
                                       "blocks.0.attention.sink_key",
                                       "blocks.0.attention.sink_value",
                                       "blocks.0.memory.query.weight",
                                       "blocks.0.memory.key.weight",
                                       "blocks.0.memory.value.weight",
                                       "blocks.0.memory.beta.weight",
                                       "blocks.0.memory.decay.weight",
                                       "blocks.0.memory.gate.weight",
                                       "blocks.0.memory.output.weight",
                                       "blocks.0.memory.convolution_weight",
                                       "blocks.0.memory.a_log",
                                       "blocks.0.memory.dt_bias",
                                       "blocks.0.memory.norm_weight",
                                       "blocks.0.mix_attention",
                                       "blocks.0.mix_memory",
                                       "blocks.0.feed_forward_norm.weight",
                                       "blocks.0.feed_forward.gate.weight",
                                       "blocks.0.feed_forward.up.weight",
                                       "blocks.0.feed_forward.down.weight",
                                       "norm.weight",
                                       "output.weight"});
}

TEST_CASE("a clone is a model of its own") {
  auto model = small_model();
  const auto clone = std::dynamic_pointer_cast<LanguageModelImpl>(model->clone());
  REQUIRE(clone);
  const at::NoGradGuard no_grad;
  const auto tokens = random_tokens(1, 20);
  const auto expected = model->forward(tokens, model->initial_state(1)).logits;
  CHECK(clone->forward(tokens, clone->initial_state(1)).logits.equal(expected));
  clone->embedding->weight.zero_();
  CHECK(model->forward(tokens, model->initial_state(1)).logits.equal(expected));
}

TEST_CASE("tokens and states that do not fit are named") {
  auto model = small_model();
  const auto state = model->initial_state(2);
  const auto refuses = [&](const Tensor& tokens, const char* text) {
    CHECK_THROWS_MATCHES(model->forward(tokens, state), ShapeError,
                         MessageMatches(ContainsSubstring(text)));
  };
  refuses(at::zeros({2, 3}), "tokens must be int64 [B, T], got Float [2, 3]");
  refuses(at::zeros({3}, at::kLong), "tokens must be int64 [B, T], got Long [3]");
  const auto mismatch = [&](const LanguageModelState& other, const char* text) {
    CHECK_THROWS_MATCHES(model->forward(random_tokens(2, 3), other), StateMismatch,
                         MessageMatches(ContainsSubstring(text)));
  };
  mismatch(model->initial_state(3), "state tensor position must be [2], got Long [3]");
  auto config = small_config();
  config.layers = 3;
  mismatch(LanguageModel(config)->initial_state(2), "the state has 3 layers, the model 2");
  config = small_config();
  config.memory_key_size = 16;
  mismatch(LanguageModel(config)->initial_state(2),
           "layers.0.memory.state must be [2, 4, 12, 20], got Float [2, 4, 16, 20]");
  config = small_config();
  config.memory = false;
  mismatch(LanguageModel(config)->initial_state(2),
           "layers.0.memory.state must be [2, 4, 12, 20], got none");
  CHECK_THROWS_AS(LanguageModel(LanguageModelConfig{.width = 0}), Error);
}

}  // namespace
}  // namespace fastweights::nn
