#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "executors.hpp"
#include "fastweights/core/cpu.hpp"
#include "gradient_check.hpp"
#include "rule_case.hpp"

namespace fastweights::test {
namespace {

template <class Real>
const core::RuleForms<Real>& forms(RuleName rule) {
  switch (rule) {
    case RuleName::kLinearAttention: return cpu::linear_attention_forms<Real>();
    case RuleName::kKda: return cpu::kda_forms<Real>();
    case RuleName::kGeneralizedDeltaRule: return cpu::generalized_delta_rule_forms<Real>();
    case RuleName::kMomentumDeltaRule: break;
  }
  return cpu::momentum_delta_rule_forms<Real>();
}

template <class Real>
void check_outputs(const RuleCase& c, const RuleCall<Real>& call, const RuleOutputs& exact,
                   double tolerance) {
  CHECK(error_ratio(call.o, exact.o) <= tolerance);
  CHECK(error_ratio(call.final_state, exact.final_state) <= tolerance);
  if (c.momentum()) CHECK(error_ratio(call.final_momentum, exact.final_momentum) <= tolerance);
}

template <class Real>
void check_forward(const RuleCase& c, double tolerance) {
  const RuleOutputs exact = oracle(c);
  const auto& rule = forms<Real>(c.options.rule);
  RuleCall<Real> chunkwise(c), recurrent(c), alone(c);
  rule.forward(chunkwise.params(), two_threads());
  check_outputs(c, chunkwise, exact, tolerance);
  rule.recurrent(recurrent.params(), two_threads());
  check_outputs(c, recurrent, exact, tolerance);
  rule.forward(alone.params(), core::serial_executor());
  CHECK(alone.o == chunkwise.o);
  CHECK(alone.final_state == chunkwise.final_state);
}

/// Random weights of a loss that is linear in all outputs.
RuleOutputs loss_weights(const RuleCase& c) {
  std::mt19937_64 random(c.options.seed + 100);
  std::normal_distribution<double> normal;
  RuleOutputs w = oracle(c);
  for (auto* values : {&w.o, &w.final_state, &w.final_momentum}) {
    for (double& value : *values) value = normal(random);
  }
  if (!c.momentum()) std::fill(w.final_momentum.begin(), w.final_momentum.end(), 0.0);
  return w;
}

double loss(const RuleCase& c, const RuleOutputs& weights) {
  const RuleOutputs out = oracle(c);
  double sum = 0;
  const auto add = [&](const std::vector<double>& x, const std::vector<double>& w) {
    for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * w[i];
  };
  add(out.o, weights.o);
  add(out.final_state, weights.final_state);
  if (c.momentum()) add(out.final_momentum, weights.final_momentum);
  return sum;
}

/// Each input's gradient against the oracle's central difference along random directions.
void check_backward(const RuleCase& c) {
  const RuleOutputs weights = loss_weights(c);
  RuleCall<double> call(c);
  const auto& rule = forms<double>(c.options.rule);
  rule.backward(call.params(), call.gradients(weights), two_threads());
  check_differences(c, call.gradients(),
                    [&](const RuleCase& moved) { return loss(moved, weights); });
  RuleCall<float> in_float(c);
  forms<float>(c.options.rule)
      .backward(in_float.params(), in_float.gradients(weights), core::serial_executor());
  for (const auto& [name, gradient] : in_float.gradients()) {
    CAPTURE(name);
    CHECK(error_ratio(gradient, call.gradients().at(name)) <= 1e-4);
  }
}

template <class Real>
Tensors gradients_of(const RuleCase& c, const RuleOutputs& weights,
                     const core::Executor& executor) {
  RuleCall<Real> call(c);
  forms<Real>(c.options.rule).backward(call.params(), call.gradients(weights), executor);
  Tensors out;
  for (const auto& [name, values] : call.gradients()) {
    out[name].assign(values.begin(), values.end());
  }
  return out;
}

/// Every gradient against the oracle's, in fp64 and fp32, with the same bits for any executor.
void check_gradients(const RuleCase& c) {
  const RuleOutputs weights = loss_weights(c);
  const Tensors exact = gradient_oracle(c, weights);
  const Tensors in_double = gradients_of<double>(c, weights, two_threads());
  const Tensors in_float = gradients_of<float>(c, weights, two_threads());
  CHECK(gradients_of<float>(c, weights, core::serial_executor()) == in_float);
  for (const auto& [name, gradient] : exact) {
    CAPTURE(name);
    CHECK(error_ratio(in_double.at(name), gradient) <= 1e-10);
    CHECK(error_ratio(in_float.at(name), gradient) <= 1e-4);
  }
}

/// Those that run through core/dplr_backward-inl.hpp.
RuleName low_rank_rule() {
  return GENERATE(RuleName::kLinearAttention, RuleName::kKda, RuleName::kGeneralizedDeltaRule);
}

RuleName any_rule() {
  return GENERATE(RuleName::kLinearAttention, RuleName::kKda, RuleName::kGeneralizedDeltaRule,
                  RuleName::kMomentumDeltaRule);
}

TEST_CASE("rule forms: outputs and states against the oracle") {
  RuleCaseOptions options;
  options.rule = any_rule();
  const std::int64_t tokens = GENERATE(0, 1, 7, 8, 9, 65, 200);
  options.shape = GENERATE(core::Shape{1, 0, 1, 1, 60, 100}, core::Shape{2, 0, 2, 4, 128, 33},
                           core::Shape{1, 0, 1, 3, 1, 64}, core::Shape{1, 0, 3, 3, 256, 1});
  options.shape.T = tokens;
  options.seed = static_cast<std::uint64_t>(tokens) + 1;
  options.use_qk_l2norm = tokens % 2 == 1 && options.shape.K > 1;
  options.initial_state = tokens != 9;
  options.forgetting = tokens == 65 ? 0.1 : 0.0;
  CAPTURE(static_cast<int>(options.rule), tokens, options.shape.K, options.shape.V);
  const RuleCase c(options);
  check_forward<double>(c, 1e-12);
  check_forward<float>(c, 1e-5);
}

TEST_CASE("rule forms: gradients against differences of the oracle") {
  RuleCaseOptions options;
  options.rule = any_rule();
  const std::int64_t tokens = GENERATE(1, 9, 40);
  options.shape = GENERATE(core::Shape{1, 0, 1, 1, 6, 10}, core::Shape{2, 0, 2, 4, 20, 3});
  options.shape.T = tokens;
  options.use_qk_l2norm = tokens == 9;
  options.initial_state = tokens != 9;
  options.reading_key = tokens != 40;
  CAPTURE(static_cast<int>(options.rule), tokens, options.shape.K, options.shape.V);
  check_backward(RuleCase(options));
}

TEST_CASE("rule forms: the gradient oracle agrees with differences of the oracle") {
  RuleCaseOptions options{.rule = low_rank_rule(), .shape = {2, 11, 1, 2, 5, 4}};
  options.use_qk_l2norm = GENERATE(false, true);
  const RuleCase c(options);
  const RuleOutputs weights = loss_weights(c);
  check_differences(c, gradient_oracle(c, weights),
                    [&](const RuleCase& moved) { return loss(moved, weights); });
}

TEST_CASE("rule forms: gradients at every length and head size") {
  RuleCaseOptions options;
  options.rule = low_rank_rule();
  const std::int64_t tokens = GENERATE(0, 1, 7, 8, 9, 63, 64, 65, 129, 200);
  options.shape = GENERATE(core::Shape{1, 0, 1, 1, 60, 100}, core::Shape{2, 0, 2, 4, 32, 33},
                           core::Shape{1, 0, 1, 3, 1, 64}, core::Shape{1, 0, 3, 3, 70, 1},
                           core::Shape{1, 0, 1, 1, 256, 17});
  options.shape.T = tokens;
  options.seed = static_cast<std::uint64_t>(tokens) + 1;
  options.use_qk_l2norm = tokens % 2 == 1 && options.shape.K > 1;
  options.initial_state = tokens != 9;
  options.forgetting = tokens == 65 ? 0.1 : 0.0;
  CAPTURE(static_cast<int>(options.rule), tokens, options.shape.K, options.shape.V);
  check_gradients(RuleCase(options));
}

TEST_CASE("rule forms: gradients of a thousand tokens") {
  RuleCaseOptions options{.rule = low_rank_rule(), .shape = {1, 1000, 1, 2, 24, 40}};
  CAPTURE(static_cast<int>(options.rule));
  check_gradients(RuleCase(options));
}

TEST_CASE("rule forms: gradients of packed sequences, some of them empty") {
  RuleCaseOptions options{.rule = low_rank_rule(), .shape = {1, 150, 2, 4, 16, 32}};
  options.cu_seqlens = {0, 0, 15, 15, 80, 149, 150, 150};
  options.use_qk_l2norm = true;
  CAPTURE(static_cast<int>(options.rule));
  check_gradients(RuleCase(options));
}

TEST_CASE("rule forms: gradients under gates from none to very strong") {
  RuleCaseOptions options{.rule = low_rank_rule(), .shape = {1, 150, 1, 2, 32, 32}};
  RuleCase c(options);
  const double scale = GENERATE(0.0, 1e-6, 0.01, 1.0, 10.0, 50.0, 200.0);
  const bool mixed = GENERATE(false, true);  // every channel, or gate, with a strength of its own
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  const std::size_t period = c.channel_gate() ? 32 : 7;
  auto& g = c.inputs["g"];
  for (std::size_t i = 0; i < g.size(); ++i) {
    const double share = mixed ? std::pow(10.0, -static_cast<double>(i % period % 6)) : 1.0;
    g[i] = static_cast<float>(-scale * share * std::abs(normal(random)));
    if (mixed && i % 211 == 0) g[i] = -std::numeric_limits<double>::infinity();
  }
  CAPTURE(static_cast<int>(options.rule), scale, mixed);
  check_gradients(c);
}

TEST_CASE("rule forms: nothing passes a token that forgets everything") {
  RuleCaseOptions options{.rule = low_rank_rule(), .shape = {1, 100, 1, 1, 16, 16}};
  RuleCase c(options);
  const auto per_token = static_cast<std::int64_t>(c.inputs["g"].size()) / options.shape.T;
  for (const std::int64_t token : {0, 64, 71}) {
    std::fill_n(c.inputs["g"].begin() + token * per_token, per_token,
                -std::numeric_limits<double>::infinity());
  }
  // What b writes of the state before the token would pass it.
  if (options.rule == RuleName::kGeneralizedDeltaRule) {
    for (const std::int64_t token : {0, 64, 71}) {
      std::fill_n(c.inputs["b"].begin() + token * options.shape.K, options.shape.K, 0.0);
    }
  }
  CAPTURE(static_cast<int>(options.rule));
  check_gradients(c);
  const Tensors gradients = gradients_of<float>(c, loss_weights(c), core::serial_executor());
  bool exact = true;
  for (const double gradient : gradients.at("initial_state")) exact = exact && gradient == 0;
  for (const std::int64_t token : {0, 64, 71}) {
    for (std::int64_t i = 0; i < per_token; ++i) {
      exact = exact && gradients.at("g")[static_cast<std::size_t>(token * per_token + i)] == 0;
    }
  }
  CHECK(exact);
}

TEST_CASE("rule forms: linear attention without a gate") {
  RuleCaseOptions options{.rule = RuleName::kLinearAttention, .shape = {1, 50, 2, 2, 16, 24}};
  options.gate = false;
  const RuleCase c(options);
  check_forward<float>(c, 1e-5);
  check_backward(c);
}

TEST_CASE("rule forms: packed sequences, some of them empty") {
  RuleCaseOptions options;
  options.rule = any_rule();
  options.shape = {1, 50, 1, 2, 12, 20};
  options.cu_seqlens = {0, 0, 9, 9, 50, 50};
  const RuleCase c(options);
  check_forward<double>(c, 1e-12);
  check_forward<float>(c, 1e-5);
  check_backward(c);
}

TEST_CASE("rule forms: a gate of minus infinity gives finite gradients") {
  RuleCaseOptions options;
  options.rule = any_rule();
  options.shape = {1, 70, 1, 1, 8, 8};
  options.forgetting = 0.2;
  const RuleCase c(options);
  RuleCall<float> call(c);
  forms<float>(options.rule)
      .backward(call.params(), call.gradients(loss_weights(c)), core::serial_executor());
  for (const auto& [name, gradient] : call.gradients()) {
    CAPTURE(name);
    bool finite = true;
    for (const float value : gradient) finite = finite && std::isfinite(value);
    CHECK(finite);
  }
}

}  // namespace
}  // namespace fastweights::test
