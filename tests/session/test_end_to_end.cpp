#include "fastweights/session/end_to_end.hpp"

#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/session/session.hpp"
#include "fastweights/session/session_pool.hpp"
#include "fastweights/session/state_file.hpp"
#include "small_session.hpp"

namespace fastweights::test {
namespace {

using Catch::Matchers::ContainsSubstring;
using Owned = std::shared_ptr<nn::LanguageModelImpl>;

constexpr std::int64_t kEvery = 8;

Owned model_of(bool head = true, bool tied = true, at::ScalarType type = at::kFloat) {
  auto config = small_config();
  config.fast_head = head;
  config.tie_embeddings = tied;
  torch::manual_seed(3);
  auto model = std::make_shared<nn::LanguageModelImpl>(config);
  model->to(type);
  model->eval();
  return model;
}

SessionOptions learning(double rate = 2.0, double clip = 1.0) {
  SessionOptions options;
  options.piece = 13;  // no multiple of the steps' tokens
  options.end_to_end = EndToEndOptions{rate, kEvery, clip};
  return options;
}

at::Tensor delta_of(const Session& session) { return tensor_of(session, "end_to_end.delta"); }

/// −rate · gradient, clipped, of the mean loss over the first `kEvery` tokens by autograd.
at::Tensor expected_step(nn::LanguageModelImpl& model, const std::string& text, double rate,
                         double clip) {
  const auto ids = io::ByteTokenizer().encode(text);
  const at::Tensor tokens = at::tensor(at::IntArrayRef(ids), at::kLong).unsqueeze(0);
  auto& layer = *model.blocks.back()->feed_forward;
  const auto logits =
      model.forward(tokens.slice(1, 0, kEvery), model.initial_state(1)).logits.squeeze(0);
  const at::Tensor loss = at::cross_entropy_loss(logits, tokens.squeeze(0).slice(0, 1, kEvery + 1));
  const auto gradients = torch::autograd::grad({loss}, {layer.gate->weight, layer.up->weight});
  const at::Tensor gradient = at::cat({gradients[0], gradients[1]});
  const double norm = gradient.norm().item<double>();
  return gradient * (-rate * std::min(1.0, clip / norm));
}

}  // namespace

TEST_CASE("a step goes down the gradient of the next tokens' loss", "[end_to_end]") {
  const OneThread one_thread;
  const std::string text = "So much t";
  REQUIRE(std::ssize(text) == kEvery + 1);
  for (const bool tied : {false, true}) {
    for (const double clip : {0.01, 1e6}) {
      INFO((tied ? "tied" : "untied") << ", clip " << clip);
      const Owned model = model_of(false, tied, at::kDouble);
      Session session(model, learning(3.0, clip));
      session.read(text.substr(0, kEvery));
      CHECK(delta_of(session).abs().max().item<double>() == 0.0);
      session.read(text.substr(kEvery));
      CHECK(distance(delta_of(session), expected_step(*model, text, 3.0, clip)) < 1e-9);
    }
  }
}

TEST_CASE("the model predicts as if its weights had changed", "[end_to_end]") {
  const OneThread one_thread;
  const Owned model = model_of(false);
  for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  Session session(model, learning());
  session.read(noise(2 * kEvery + 1));  // the last step came before the last token
  const auto changed = std::static_pointer_cast<nn::LanguageModelImpl>(model->clone());
  const auto halves = delta_of(session).chunk(2);
  auto& layer = *changed->blocks.back()->feed_forward;
  {
    const at::NoGradGuard no_gradient;
    layer.gate->weight.add_(halves[0]);
    layer.up->weight.add_(halves[1]);
  }
  // No state depends on the last feed-forward: only the prediction does.
  Session expected(changed, {.piece = 13});
  expected.read(noise(2 * kEvery + 1));
  CHECK(distance(session.logits(), expected.logits()) < 1e-4);
  Session without(model, {.piece = 13});
  without.read(noise(2 * kEvery + 1));
  CHECK(distance(session.logits(), without.logits()) > 1e-3);
}

TEST_CASE("learning end to end lowers the cost of a text like the one read", "[end_to_end]") {
  const OneThread one_thread;
  const Owned model = model_of(false);
  std::string text;
  for (int i = 0; i < 40; ++i) text += "Round the rugged rock. ";
  Session learns(model, learning(1.0));
  Session plain(model);
  CHECK(learns.score(text) < plain.score(text) - 0.5);
}

TEST_CASE("steps do not depend on how the text came", "[end_to_end]") {
  const OneThread one_thread;
  const Owned model = model_of();
  const std::string text = noise(100);
  Session whole(model, learning());
  whole.read(text);
  Session parts(model, learning());
  for (std::size_t begin = 0, size = 1; begin < text.size(); begin += size, size = size % 11 + 3) {
    parts.read(text.substr(begin, size));
  }
  CHECK(distance(delta_of(parts), delta_of(whole)) < 1e-4);
  CHECK(distance(parts.logits(), whole.logits()) < 1e-3);
}

TEST_CASE("what is written is learned as what is read", "[end_to_end]") {
  const OneThread one_thread;
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const Owned model = model_of(true, true, type);
    INFO(c10::toString(type));
    Session writes(model, learning());
    writes.read("Once");
    CHECK(writes.fused() == (type != at::kDouble));
    const std::string text = writes.write({.max_tokens = 60, .seed = 1});
    Session reads(model, learning());
    reads.read("Once");
    for (const char c : text) reads.read(std::string(1, c));
    const double tolerance = type == at::kBFloat16 ? 0.1 : 1e-3;
    CHECK(distance(delta_of(writes), delta_of(reads)) < tolerance);
    CHECK(distance(writes.logits(), reads.logits()) < tolerance);
    CHECK(delta_of(writes).norm().item<double>() > 0.1);
  }
}

TEST_CASE("strength 0 leaves no step, and strengths weigh", "[end_to_end]") {
  const OneThread one_thread;
  const Owned model = model_of(/*head=*/false);
  const std::string text = noise(4 * kEvery);
  SessionOptions frozen = learning();
  frozen.policy = kFrozen;
  Session session(model, frozen);
  session.read(text);
  session.write({.max_tokens = 20});
  CHECK(delta_of(session).abs().max().item<double>() == 0.0);

  Session undone(model, learning());
  undone.read(text);
  CHECK(delta_of(undone).norm().item<double>() > 0.1);
  undone.feedback(0, 4 * kEvery, 0.0F);
  CHECK(delta_of(undone).abs().max().item<double>() == 0.0);

  const auto step_at = [&](float strength) {
    SessionOptions options = learning(1.0, 1e6);
    options.policy.strength = strength;
    Session one(model, options);
    one.read(text.substr(0, kEvery + 1));
    return delta_of(one);
  };
  // The memories would learn less too: without them the step is in proportion.
  for (auto& block : model->blocks) block->memory_enabled = false;
  CHECK(distance(step_at(0.5F), 0.5 * step_at(1.0F)) < 1e-4);
}

TEST_CASE("edits of a session that learns end to end are exact", "[end_to_end]") {
  const OneThread one_thread;
  const Owned model = model_of();
  for (const bool store : {false, true}) {
    SessionOptions options = learning();
    if (store) options.store.emplace();
    check_is_function_of_log(model, options);
  }
}

TEST_CASE("copies do not learn from each other", "[end_to_end]") {
  const OneThread one_thread;
  const Owned model = model_of();
  Session session(model, learning());
  session.read(noise(30));
  const at::Tensor before = delta_of(session);
  Session fork = session;
  fork.read(noise(40, 2));
  fork.write({.max_tokens = 20});
  CHECK(at::equal(delta_of(session), before));
  CHECK_FALSE(at::equal(delta_of(fork), before));
}

TEST_CASE("it works under every write policy", "[end_to_end]") {
  const OneThread one_thread;
  const Owned model = model_of();
  for (const float strength : {0.5F, 1.5F}) {
    SessionOptions options = learning();
    options.policy = {.strength = strength,
                      .surprise = SurpriseGate{0.0, 8.0, 0.2F, 1.0F},
                      .memory_norm_cap = 2.0};
    Session session(model, options);
    session.read(noise(40));
    session.write({.max_tokens = 20, .seed = 1});
    CHECK(same_bits(session, Session::from_log(model, session.log(), options)));
  }
}

TEST_CASE("in a pool they get the bits that they get alone", "[end_to_end]") {
  const OneThread one_thread;
  const Owned model = model_of();
  SessionPool pool(model, {.session = learning()});
  std::vector<Session> expected;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 3; ++i) {
    expected.emplace_back(model, i == 1 ? SessionOptions{} : learning());
    expected.back().read(noise(20 + 3 * i));
    pool.add(std::to_string(i), expected.back());
    expected.back().write({.max_tokens = 40, .seed = i});
  }
  for (std::size_t i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] { pool.write(std::to_string(i), {.max_tokens = 40, .seed = i}); });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < 3; ++i) {
    pool.use(std::to_string(i), [&](Session& session) { CHECK(same_bits(session, expected[i])); });
  }
}

TEST_CASE("options out of range are refused", "[end_to_end]") {
  const Owned model = model_of();
  const auto attempt = [&](double rate, std::int64_t every, double clip) {
    Session(model, {.end_to_end = EndToEndOptions{rate, every, clip}});
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_WITH(attempt(-1, 8, 1), ContainsSubstring("learning_rate must be in [0, 1000]"));
  CHECK_THROWS_WITH(attempt(nan, 8, 1), ContainsSubstring("learning_rate must be in [0, 1000]"));
  CHECK_THROWS_WITH(attempt(1, 0, 1), ContainsSubstring("every must be in [1, 4096], got 0"));
  CHECK_THROWS_WITH(attempt(1, 5000, 1), ContainsSubstring("every must be in [1, 4096]"));
  CHECK_THROWS_WITH(attempt(1, 8, 0), ContainsSubstring("clip must be finite and above 0"));
}

TEST_CASE("a piece after which ΔW is not finite is refused", "[end_to_end]") {
  const OneThread one_thread;
  const Owned model = model_of();
  {
    const at::NoGradGuard no_gradient;
    model->norm->weight.fill_(1e18);
  }
  Session session(model, learning(1000.0, 1e30));
  CHECK_THROWS_WITH(session.read(noise(60)), ContainsSubstring("is not finite any more"));
  CHECK(session.position() % 13 == 0);
}

}  // namespace fastweights::test
