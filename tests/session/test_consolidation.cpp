#include "fastweights/session/consolidation.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <map>
#include <string>
#include <utility>

#include "fastweights/core/error.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/nn/model_folder.hpp"
#include "small_session.hpp"

namespace fastweights::test {
namespace {

using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;

Model with_head(std::uint64_t seed = 1) {
  auto config = small_config();
  config.fast_head = true;
  return random_model(seed, config);
}

/// Sentences that a head can learn from: the same few words in another order each time.
std::string chatter(std::size_t size, std::uint32_t seed) {
  const char* words[] = {"the ", "stone ", "river ", "bends ", "slowly ", "and "};
  std::string text;
  for (std::uint32_t x = seed; text.size() < size;) {
    x = x * 1664525U + 1013904223U;
    text += words[(x >> 16) % 6];
  }
  return text.substr(0, size);
}

std::map<std::string, at::Tensor> start_of(const Model& model) {
  std::map<std::string, at::Tensor> tensors;
  for (auto& [name, tensor] : model->initial_state(1).tensors()) tensors.emplace(name, tensor);
  return tensors;
}

Session reader_of(const Model& model, const std::string& text) {
  Session session(model);
  session.read(text);
  return session;
}

/// How far the guarded text moves where all of that part is kept: unprotected, and at a protection
/// of 10.
std::pair<double, double> costs_of(const Consolidation& result,
                                   double ConsolidationTrial::* share) {
  std::pair<double, double> costs;
  for (const auto& trial : result.trials) {
    const double cost = std::abs(trial.guarded_bits - result.before.guarded_bits);
    if (trial.*share != 1) continue;
    if (trial.protection == 0) costs.first = cost;
    if (trial.protection == 10) costs.second = cost;
  }
  return costs;
}

TEST_CASE("consolidation: the new model starts from what was learned, and the old one stays") {
  const Model model = with_head();
  const auto before = start_of(model);
  const Session session = reader_of(model, chatter(4000, 1));
  const auto state = session.state();
  const std::string trial = chatter(1500, 2);
  const Consolidation result = consolidate(session, {.trial = trial});

  CHECK(result.chosen.trial_bits < result.before.trial_bits);
  CHECK(result.trials.size() ==
        5);  // two shares of the head with and without the blocks, and these
  const Session fresh(result.model);
  CHECK(fresh.score(trial) == result.chosen.trial_bits);
  CHECK(Session(model).score(trial) == result.before.trial_bits);
  for (const auto& [name, tensor] : start_of(model)) CHECK(at::equal(tensor, before.at(name)));
  const auto starts = start_of(result.model);
  for (const auto& [name, tensor] : state) {
    double share = -1;
    if (name.ends_with("memory.state")) share = result.chosen.memory_share;
    if (name == "head.state") share = result.chosen.head_share;
    if (share >= 0) CHECK(at::equal(starts.at(name), tensor * share));
  }
}

TEST_CASE("consolidation: only what was asked for changes") {
  const Model model = with_head();
  const Session session = reader_of(model, chatter(4000, 1));
  const Consolidation result = consolidate(session, {.trial = chatter(1500, 2), .memory = false});
  CHECK(result.chosen.memory_share == 0);
  CHECK(result.chosen.head_share > 0);
  for (const auto& [name, tensor] : start_of(result.model)) {
    if (name.ends_with("memory.state")) CHECK(at::count_nonzero(tensor).item<std::int64_t>() == 0);
  }
}

TEST_CASE("consolidation: the best of what is tried is taken, wherever it stands") {
  const std::string text = chatter(4000, 1);
  const Session session = reader_of(with_head(), text);
  for (const auto& trial : {text.substr(0, 1500), chatter(300, 2), std::string("stone")}) {
    const Consolidation result = consolidate(session, {.trial = trial});
    for (const auto& each : result.trials) CHECK(result.chosen.trial_bits <= each.trial_bits);
  }
}

TEST_CASE("consolidation: the model's file holds what it starts from") {
  const Session session = reader_of(with_head(), chatter(4000, 1));
  const Consolidation result = consolidate(session, {.trial = chatter(1500, 2)});
  const TemporaryFolder folder;
  save_model(folder / "model", *result.model);
  const auto loaded = load_model(folder / "model");
  const auto starts = start_of(result.model);
  for (const auto& [name, tensor] : start_of(loaded)) CHECK(at::equal(tensor, starts.at(name)));
  CHECK(Session(loaded).score("stone river") == Session(result.model).score("stone river"));
}

TEST_CASE("consolidation: without a trial text the end of the session's own is tried") {
  const std::string text = chatter(6000, 1);
  const Session session = reader_of(with_head(), text);
  const Consolidation result = consolidate(session);
  const std::string tail = text.substr(5400);
  CHECK(result.before.trial_bits == Session(session.model()).score(tail));
  // What is tried has not read the tail, what is returned has.
  const Consolidation without =
      consolidate(reader_of(session.model(), text.substr(0, 5400)), {.trial = tail});
  CHECK(result.chosen.trial_bits == without.chosen.trial_bits);
  const auto state = session.state();
  const auto head = std::ranges::find(state, std::string("head.state"),
                                      &std::pair<std::string, at::Tensor>::first);
  REQUIRE(head != state.end());
  CHECK(
      at::equal(start_of(result.model).at("head.state"), head->second * result.chosen.head_share));
  CHECK_THROWS_MATCHES(consolidate(reader_of(with_head(), "short")), Error,
                       MessageMatches(ContainsSubstring("fewer than a trial needs")));
}

TEST_CASE("consolidation: what does not help is refused with the figures") {
  const Session session(with_head());  // it has learned nothing
  CHECK_THROWS_MATCHES(consolidate(session, {.trial = chatter(500, 2)}), Error,
                       MessageMatches(ContainsSubstring("refused; at best the trial text costs")));
}

TEST_CASE("consolidation: a guarded text costs no more than the tolerance") {
  const Model model = with_head();
  // What the model itself would write, and so knows: any change makes it dearer.
  const std::string guarded = Session(model).write({.max_tokens = 600, .temperature = 0.7});
  const Session session = reader_of(model, chatter(4000, 1));
  ConsolidationOptions options{.trial = chatter(1500, 2), .guarded = guarded, .tolerance = 100};
  const Consolidation free = consolidate(session, options);
  CHECK(free.trials.size() == 13);
  const double cost = free.chosen.guarded_bits - free.before.guarded_bits;
  REQUIRE(cost > 0);
  for (const double tolerance : {0.0, 0.5 * cost}) {
    options.tolerance = tolerance;
    try {
      const Consolidation result = consolidate(session, options);
      CHECK(Session(result.model).score(guarded) <= Session(model).score(guarded) + tolerance);
    } catch (const Error& error) {
      CHECK_THAT(error.what(), ContainsSubstring("the guarded text"));
    }
  }
  CHECK_THROWS_MATCHES(consolidate(session, {.tolerance = -1}), Error,
                       MessageMatches(ContainsSubstring("tolerance must be at least 0")));
}

TEST_CASE("consolidation: a protected direction keeps its reads") {
  const Model model = with_head();
  const std::string guarded(800, 'x');
  const Session session = reader_of(model, chatter(4000, 1));
  const Consolidation result = consolidate(
      session, {.trial = chatter(1500, 2), .guarded = guarded, .tolerance = 100, .memory = false});
  const auto [unprotected, shielded] = costs_of(result, &ConsolidationTrial::head_share);
  CHECK(shielded < unprotected);
}

// ---- what was learned end to end ----------------------------------------------------------------

Session end_to_end_reader(const Model& model, const std::string& text) {
  Session session(model, {.end_to_end = EndToEndOptions{}});
  session.read(text);
  return session;
}

at::Tensor delta_of(const Session& session) {
  for (const auto& [name, tensor] : session.state()) {
    if (name == "end_to_end.delta") return tensor;
  }
  return {};
}

at::Tensor projections_of(const Model& model) {
  const auto& layer = *model->blocks.back()->feed_forward;
  return at::cat({layer.gate->weight, layer.up->weight}).detach();
}

TEST_CASE("consolidation: what was learned end to end becomes weights of the new model alone") {
  const Model model = random_model();
  const auto before = projections_of(model).clone();
  const Session session = end_to_end_reader(model, chatter(4000, 1));
  const std::string trial = chatter(1500, 2);
  const Consolidation result = consolidate(session, {.trial = trial, .memory = false, .rank = 0});

  CHECK(result.trials.size() == 2);
  CHECK(result.chosen.trial_bits < result.before.trial_bits);
  CHECK(result.chosen.feed_forward_share > 0);
  CHECK(at::equal(projections_of(model), before));
  const auto change = delta_of(session) * result.chosen.feed_forward_share;
  CHECK(at::equal(projections_of(result.model), before + change));
  CHECK(Session(result.model).score(trial) == result.chosen.trial_bits);
  for (const auto& item : result.model->named_parameters()) {
    const bool own = item.key().ends_with("gate.weight") || item.key().ends_with("up.weight");
    const auto* old = model->named_parameters().find(item.key());
    if (own || old == nullptr) continue;
    CHECK(item.value().data_ptr() == old->data_ptr());
  }
  CHECK_THROWS_MATCHES(
      consolidate(session, {.trial = trial, .memory = false, .feed_forward = false}), Error,
      MessageMatches(ContainsSubstring("no memory")));
  CHECK_THROWS_MATCHES(consolidate(session, {.trial = trial, .rank = -1}), Error,
                       MessageMatches(ContainsSubstring("rank must be at least 0")));
}

TEST_CASE("consolidation: the change of the projections has the rank that was asked for") {
  const Model model = random_model();
  const auto before = projections_of(model).clone();
  const Session session = end_to_end_reader(model, chatter(4000, 1));
  for (const std::int64_t rank : {1, 5}) {
    const Consolidation result =
        consolidate(session, {.trial = chatter(1500, 2), .memory = false, .rank = rank});
    const auto values = at::linalg_svdvals((projections_of(result.model) - before).to(at::kDouble));
    const auto exact = at::linalg_svdvals(delta_of(session).to(at::kDouble));
    CHECK(values[rank - 1].item<double>() ==
          Catch::Approx(exact[rank - 1].item<double>() * result.chosen.feed_forward_share)
              .epsilon(1e-4));
    CHECK(values[rank].item<double>() < 1e-5 * values[0].item<double>());
  }
}

TEST_CASE("consolidation: a guarded text's inputs hardly feel the change of the projections") {
  const Model model = random_model();
  const Session session = end_to_end_reader(model, chatter(4000, 1));
  const std::string guarded(800, 'x');
  const Consolidation result = consolidate(
      session, {.trial = chatter(1500, 2), .guarded = guarded, .tolerance = 100, .memory = false});
  CHECK(result.trials.size() == 6);
  const auto [unprotected, shielded] = costs_of(result, &ConsolidationTrial::feed_forward_share);
  CHECK(shielded < 0.5 * unprotected);
}

TEST_CASE("consolidation: head and feed-forward are tried apart and together") {
  const Session session = end_to_end_reader(with_head(), chatter(4000, 1));
  const Consolidation result = consolidate(session, {.trial = chatter(1500, 2)});
  CHECK(result.trials.size() == 13);
  const auto has = [&](double head, double layer) {
    return std::ranges::any_of(result.trials, [&](const ConsolidationTrial& trial) {
      return trial.head_share == head && trial.feed_forward_share == layer;
    });
  };
  CHECK(has(1, 0));
  CHECK(has(0, 1));
  CHECK(has(0.5, 0.5));
  CHECK_FALSE(has(0.5, 1));
}

TEST_CASE("consolidation: a model without memories has nothing to consolidate") {
  auto config = small_config();
  config.memory = false;
  const Session session = reader_of(random_model(1, config), chatter(4000, 1));
  CHECK_THROWS_MATCHES(consolidate(session), Error, MessageMatches(ContainsSubstring("no memory")));
}

TEST_CASE("consolidation: stopped between trials it leaves nothing") {
  const Session session = reader_of(with_head(), chatter(4000, 1));
  std::int64_t seen = 0;
  const auto stop = [&](std::int64_t done, std::int64_t) { return (seen = done) < 2; };
  CHECK_THROWS_AS(consolidate(session, {.trial = "the river bends"}, stop), Cancelled);
  CHECK(seen == 2);
}

TEST_CASE("rebase: the session on the other model has read and written the same") {
  const Model model = with_head();
  Session session = reader_of(model, chatter(3000, 1));
  session.write({.max_tokens = 20, .seed = 3});
  const Consolidation result = consolidate(session, {.trial = chatter(1500, 2)});
  const Session moved = rebase(session, result.model);
  CHECK(moved.log() == session.log());
  CHECK(moved.model() == result.model);
  CHECK(same_bits(rebase(session, model), session));
}

}  // namespace
}  // namespace fastweights::test
