#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
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
