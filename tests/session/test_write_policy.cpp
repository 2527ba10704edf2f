#include "fastweights/session/write_policy.hpp"

#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/session/session.hpp"
#include "small_session.hpp"

namespace fastweights::test {
namespace {

using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::WithinAbs;

constexpr std::int64_t kPiece = 16;

Model with_head(std::uint64_t seed = 1) {
  auto config = small_config();
  config.fast_head = true;
  return random_model(seed, config);
}

/// In fp64, so that `write` goes module by module.
Model unfused() {
  auto config = small_config();
  config.fast_head = true;
  torch::manual_seed(1);
  auto model = std::make_shared<nn::LanguageModelImpl>(config);
  model->to(at::kDouble);
  model->eval();
  for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  return model;
}

std::map<std::string, at::Tensor> named(const Session& session) {
  std::map<std::string, at::Tensor> out;
  for (auto& [name, tensor] : session.state()) out.emplace(name, tensor);
  return out;
}

/// Largest norm of a head's matrix in the blocks, or of the one at the head.
double largest_norm(const Session& session, const std::string& suffix) {
  double largest = 0;
  for (const auto& [name, tensor] : named(session)) {
    if (!name.ends_with(suffix)) continue;
    largest = std::max(largest, tensor.to(at::kDouble).norm(2, {-2, -1}).max().item<double>());
  }
  return largest;
}

/// The bits of each token and the state after it, by the model alone.
struct Forward {
  std::vector<double> bits;
  nn::LanguageModelState state;
  at::Tensor logits;
};

Forward forward(const Model& model, const std::string& text, const nn::LanguageModelState& state,
                const at::Tensor& before, const std::vector<float>& strengths) {
  const c10::InferenceMode guard;
  const auto tokens = io::ByteTokenizer().encode(text);
  nn::ForwardOptions options;
  options.write_strength = at::tensor(at::ArrayRef<float>(strengths)).unsqueeze(0);
  auto output = model->forward(at::tensor(tokens).unsqueeze(0), state, options);
  const at::Tensor rows = output.logits[0].to(at::kFloat);
  const at::Tensor all = at::log_softmax(at::cat({before.unsqueeze(0), rows}), 1);
  Forward out{{}, output.state, rows[-1].clone()};
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    out.bits.push_back(-all[static_cast<std::int64_t>(t)][tokens[t]].item<float>() / std::log(2.0));
  }
  return out;
}

}  // namespace

// ---- the policy --------------------------------------------------------------------------------

TEST_CASE("a policy's strength is a product, at most 2", "[write_policy]") {
  CHECK(strength_under({}, 0.7F, 9.0) == 0.7F);
  CHECK(strength_under({.strength = 0.5F}, 0.5F, 9.0) == 0.25F);
  CHECK(strength_under({.strength = 2.0F}, 1.5F, 9.0) == 2.0F);
  CHECK(strength_under({.strength = 0.0F}, 2.0F, 9.0) == 0.0F);
  const WritePolicy gate{.surprise = SurpriseGate{1.0, 5.0, 0.5F, 1.5F}};
  CHECK(strength_under(gate, 1.0F, 0.0) == 0.5F);
  CHECK(strength_under(gate, 1.0F, 1.0) == 0.5F);
  CHECK(strength_under(gate, 1.0F, 3.0) == 1.0F);
  CHECK(strength_under(gate, 1.0F, 5.0) == 1.5F);
  CHECK(strength_under(gate, 1.0F, 99.0) == 1.5F);
  CHECK(strength_under(gate, 0.5F, 3.0) == 0.5F);
  const WritePolicy falling{.strength = 0.5F, .surprise = SurpriseGate{0.0, 4.0, 1.0F, 0.0F}};
  CHECK(strength_under(falling, 1.0F, 1.0) == 0.375F);
}

TEST_CASE("policies out of range are errors", "[write_policy]") {
  const double nan = std::nan("");
  const double infinite = std::numeric_limits<double>::infinity();
  const auto refused = [](const WritePolicy& policy, const std::string& message) {
    INFO(message);
    CHECK_THROWS_WITH(check_write_policy(policy), ContainsSubstring(message));
    CHECK_THROWS_AS(Session(random_model(), {.policy = policy}), Error);
  };
  refused({.strength = -0.1F}, "strength must be in [0, 2");
  refused({.strength = 2.1F}, "strength must be in [0, 2");
  refused({.strength = static_cast<float>(nan)}, "strength must be in [0, 2");
  refused({.memory_norm_cap = -1}, "memory_norm_cap must be at least 0");
  refused({.head_norm_cap = infinite}, "head_norm_cap must be at least 0 and finite");
  refused({.surprise = SurpriseGate{2.0, 2.0}}, "low must be below high");
  refused({.surprise = SurpriseGate{-1.0, 2.0}}, "low must be at least 0");
  refused({.surprise = SurpriseGate{0.0, nan}}, "high must be at least 0");
  refused({.surprise = SurpriseGate{0.0, 1.0, 3.0F}}, "least must be in [0, 2");
  refused({.surprise = SurpriseGate{0.0, 1.0, 0.0F, -3.0F}}, "most must be in [0, 2");
  CHECK_NOTHROW(check_write_policy({}));
}

// ---- strengths ---------------------------------------------------------------------------------

TEST_CASE("a read under a policy is one that was given that feedback", "[write_policy]") {
  const float strength = GENERATE(0.0F, 0.5F, 1.5F, 2.0F);
  CAPTURE(strength);
  for (const bool store : {false, true}) {
    SessionOptions options{.piece = kPiece};
    if (store) options.store = ExactStoreOptions();
    Session plain(with_head(), options);
    options.policy.strength = strength;
    Session session(with_head(), options);
    plain.read(noise(70));
    session.read(noise(70));
    plain.feedback(0, strength);
    CHECK(same_bits(session, plain));
    CHECK(session.report().limited_writes == plain.report().limited_writes);
    // What a policy does comes on top of feedback.
    session.feedback(10, 40, 0.5F);
    plain.feedback(10, 40, 0.5F * strength);
    CHECK(same_bits(session, plain));
  }
}

TEST_CASE("a frozen session reads and writes, and learns nothing", "[write_policy]") {
  Session session(with_head(), {.piece = kPiece, .policy = kFrozen});
  REQUIRE(session.fused());
  session.read(noise(50));
  session.write({.max_tokens = 40, .seed = 1});
  CHECK(session.position() == 90);
  CHECK(largest_norm(session, "memory.state") == 0);
  CHECK(largest_norm(session, "head.state") == 0);
  Session learning(with_head(), {.piece = kPiece});
  learning.read(noise(50));
  CHECK(largest_norm(learning, "memory.state") > 0);
  CHECK(largest_norm(learning, "head.state") > 0);
}

TEST_CASE("what is written under a policy is learned with that strength", "[write_policy]") {
  const float strength = GENERATE(0.5F, 1.5F);
  CAPTURE(strength);
  const Model model = unfused();
  Session session(model, {.piece = kPiece, .policy = {.strength = strength}});
  REQUIRE_FALSE(session.fused());
  const std::string text = session.write({.max_tokens = 30, .seed = 1});
  auto state = model->initial_state(1);
  at::Tensor logits = at::zeros({256});
  for (const char c : text) {
    auto one = forward(model, std::string(1, c), state, logits, {strength});
    state = one.state;
    logits = one.logits;
  }
  const auto mine = named(session);
  for (const auto& [name, tensor] : state.tensors()) {
    INFO(name);
    CHECK(at::allclose(mine.at(name).to(at::kDouble), tensor.to(at::kDouble), 1e-6, 1e-9));
  }
  CHECK(at::allclose(mine.at("logits"), logits, 1e-5, 1e-6));
  // On the kernels the same, up to the rounding of fp32.
  Session fused(with_head(), {.piece = kPiece, .policy = {.strength = strength}});
  REQUIRE(fused.fused());
  const std::string on_kernels = fused.write({.max_tokens = 30, .seed = 1});
  CHECK(on_kernels == text);
  for (const auto& [name, tensor] : named(fused)) {
    INFO(name);
    CHECK(at::allclose(tensor.to(at::kDouble), mine.at(name).to(at::kDouble), 1e-3, 1e-4));
  }
}

TEST_CASE("surprise decides how strongly a token is learned", "[write_policy]") {
  const OneThread one_thread;
  const WritePolicy policy{.strength = 0.9F, .surprise = SurpriseGate{4.0, 9.0, 0.25F, 1.5F}};
  const Model model = with_head();
  Session session(model, {.piece = kPiece, .policy = policy});
  const std::string text = noise(40);
  session.read(text);

  auto state = model->initial_state(1);
  at::Tensor logits = at::zeros({256});
  std::vector<float> seen;
  for (std::size_t at = 0; at < text.size(); at += kPiece) {
    const std::string piece = text.substr(at, kPiece);
    const auto first = forward(model, piece, state, logits, std::vector<float>(piece.size(), 0.9F));
    std::vector<float> strengths;
    for (const double bits : first.bits) {
      strengths.push_back(strength_under(policy, 1.0F, bits));
      seen.push_back(strengths.back());
    }
    const auto second = forward(model, piece, state, logits, strengths);
    state = second.state;
    logits = second.logits;
  }
  REQUIRE(*std::ranges::max_element(seen) - *std::ranges::min_element(seen) > 0.3F);
  const auto mine = named(session);
  for (const auto& [name, tensor] : state.tensors()) {
    INFO(name);
    CHECK(at::allclose(mine.at(name).to(at::kDouble), tensor.to(at::kDouble), 1e-5, 1e-6));
  }
  // A gate that is flat is a strength.
  Session flat(model, {.piece = kPiece, .policy = {.surprise = SurpriseGate{0, 1, 0.5F, 0.5F}}});
  Session half(model, {.piece = kPiece, .policy = {.strength = 0.5F}});
  for (Session* each : {&flat, &half}) {
    each->read(text);
    each->write({.max_tokens = 20, .seed = 3});
  }
  CHECK(same_bits(flat, half));
}

// ---- guards ------------------------------------------------------------------------------------

TEST_CASE("no matrix is larger than its cap", "[write_policy]") {
  Session plain(with_head(), {.piece = kPiece});
  plain.read(noise(300));
  const double memory = largest_norm(plain, "memory.state");
  const double head = largest_norm(plain, "head.state");
  Session capped(
      with_head(),
      {.piece = kPiece, .policy = {.memory_norm_cap = memory / 3, .head_norm_cap = head / 3}});
  capped.read(noise(300));
  CHECK_THAT(largest_norm(capped, "memory.state"), WithinAbs(memory / 3, memory * 1e-5));
  CHECK_THAT(largest_norm(capped, "head.state"), WithinAbs(head / 3, head * 1e-5));
  const auto after_reading = capped.report().capped_norms;
  CHECK(after_reading > 20);
  capped.write({.max_tokens = 30, .seed = 1});
  CHECK(largest_norm(capped, "memory.state") <= memory / 3 * (1 + 1e-5));
  CHECK(largest_norm(capped, "head.state") <= head / 3 * (1 + 1e-5));
  CHECK(capped.report().capped_norms > after_reading);
  capped.rollback(300);
  CHECK(capped.report().capped_norms == after_reading);
  CHECK(plain.report().capped_norms == 0);
  Session loose(with_head(), {.piece = kPiece, .policy = {.memory_norm_cap = memory * 100}});
  loose.read(noise(300));
  CHECK(same_bits(loose, plain));
  CHECK(loose.report().capped_norms == 0);
}

TEST_CASE("a piece that makes numbers infinite is not read", "[write_policy]") {
  auto config = small_config();
  config.tie_embeddings = false;
  torch::manual_seed(1);
  auto model = std::make_shared<nn::LanguageModelImpl>(config);
  model->eval();
  for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  model->embedding->weight[7].fill_(std::nan(""));
  Session session(model, {.piece = kPiece});
  const std::string good(40, 'a');
  session.read(good);
  const Session before = session;
  CHECK_THROWS_WITH(session.read("abc\x07"), ContainsSubstring("not finite any more"));
  CHECK(same_bits(session, before));
  CHECK(session.position() == 40);
  std::string two_pieces(kPiece + 1, 'b');
  two_pieces.back() = '\x07';
  CHECK_THROWS_AS(session.read(two_pieces), Error);
  CHECK(session.position() == 40 + kPiece);  // what came before that piece
  Session expected = before;
  expected.read(std::string(kPiece, 'b'));
  CHECK(same_bits(session, expected));
  CHECK_THROWS_AS(session.score("\x07"), Error);
}

// ---- edits, copies, files ----------------------------------------------------------------------

TEST_CASE("edits are exact under a policy", "[write_policy]") {
  const OneThread one_thread;
  const bool store = GENERATE(false, true);
  const bool fused = GENERATE(false, true);
  CAPTURE(store, fused);
  const Model model = fused ? with_head() : unfused();
  SessionOptions options{.piece = kPiece,
                         .seed = 3,
                         .policy = {.strength = 0.8F,
                                    .surprise = SurpriseGate{2.0, 10.0, 0.3F, 1.4F},
                                    .memory_norm_cap = 0.5,
                                    .head_norm_cap = 0.5}};
  if (store) options.store = ExactStoreOptions();
  const auto drive = [&](std::int64_t end) {
    Session session(model, options);
    session.read(noise(static_cast<std::size_t>(std::min<std::int64_t>(end, 40))));
    if (end > 40) session.write({.max_tokens = std::min<std::int64_t>(end - 40, 30), .seed = 8});
    if (end > 70) session.read(noise(static_cast<std::size_t>(end - 70), 2));
    return session;
  };
  const Session whole = drive(100);
  CHECK(whole.report().capped_norms > 0);
  for (const std::int64_t end : {99, 85, 71, 70, 69, 55, 41, 40, 20, 1}) {
    INFO("to " << end);
    Session session = whole;
    session.rollback(end);
    const Session expected = drive(end);
    REQUIRE(same_bits(session, expected));
    REQUIRE(session.report().capped_norms == expected.report().capped_norms);
  }
  Session session = whole;
  session.feedback(30, 80, 0.0F);
  CHECK_FALSE(same_bits(session, whole));
  session.feedback(30, 80, 1.0F);
  CHECK(same_bits(session, whole));
  CHECK(same_bits(Session::from_log(model, whole.log(), options), whole));

  const TemporaryFolder folder;
  session.feedback(50, 60, 0.5F);
  session.save(folder / "a");
  Session loaded = Session::load(folder / "a", model);
  CHECK(same_bits(loaded, session));
  CHECK(loaded.options().policy == options.policy);
  CHECK(loaded.report().capped_norms == session.report().capped_norms);
  for (Session* each : {&loaded, &session}) {
    each->read("and on");
    each->write({.max_tokens = 10});
    each->rollback(45);
  }
  CHECK(same_bits(loaded, session));
  session.commit();
  session.read(noise(20, 5));
  session.save(folder / "b");
  loaded = Session::load(folder / "b", model);
  CHECK(same_bits(loaded, session));
  CHECK(loaded.report().capped_norms == session.report().capped_norms);
}

// ---- rewards -----------------------------------------------------------------------------------

TEST_CASE("a reward fades with distance", "[write_policy]") {
  const OneThread one_thread;
  const float r = GENERATE(-1.0F, -0.3F, 0.5F, 1.0F);
  const double half_life = GENERATE(0.5, 7.0, 40.0);
  CAPTURE(r, half_life);
  Session session(with_head(), {.piece = kPiece});
  session.read(noise(80));
  session.write({.max_tokens = 40, .seed = 2});
  session.feedback(0, 5, 0.25F);
  Session expected = session;
  session.reward(r, half_life);

  std::vector<float> strengths = session.log().strengths(0, 120);
  if (strengths.empty()) strengths.resize(120, 1.0F);
  for (std::int64_t t = 0; t < 120; ++t) {
    const double trace = std::exp2(-static_cast<double>(119 - t) / half_life);
    const auto step = static_cast<float>(std::round(64.0 * r * trace) / 64.0);
    INFO("token " << t);
    const float before = t < 5 ? 0.25F : 1.0F;
    REQUIRE(strengths[static_cast<std::size_t>(t)] == (step == 0 ? before : 1.0F + step));
    if (step != 0) expected.feedback(t, t + 1, 1.0F + step);
  }
  CHECK(same_bits(session, expected));
  CHECK(session.log() == expected.log());
}

TEST_CASE("rewards out of range are errors", "[write_policy]") {
  Session session(random_model(), {.piece = kPiece});
  CHECK_NOTHROW(session.reward(1.0F));
  session.read("abc");
  CHECK_THROWS_WITH(session.reward(1.1F), ContainsSubstring("reward must be in [-1, 1]"));
  CHECK_THROWS_WITH(session.reward(-1.1F), ContainsSubstring("reward must be in [-1, 1]"));
  CHECK_THROWS_WITH(session.reward(std::nanf("")), ContainsSubstring("reward must be in [-1, 1]"));
  CHECK_THROWS_WITH(session.reward(1.0F, 0.0), ContainsSubstring("half-life"));
  CHECK_THROWS_WITH(session.reward(1.0F, std::nan("")), ContainsSubstring("half-life"));
  const Session before = session;
  session.reward(0.0F);
  CHECK(same_bits(session, before));
  session.commit();
  CHECK_NOTHROW(session.reward(1.0F));
}

}  // namespace fastweights::test
