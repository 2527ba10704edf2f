// Long sequences in one call: errors do not grow with the tokens. benchmarks/numerics/accuracy.py
// measures the same along a million.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "delta_rule_case.hpp"
#include "executors.hpp"
#include "fastweights/core/cpu.hpp"
#include "fastweights/core/reference.hpp"
#include "rule_case.hpp"

namespace fastweights::test {
namespace {

constexpr std::int64_t kTokens = 20'000;
constexpr std::int64_t kWindow = 1'000;

const core::RuleForms<float>& forms_of(RuleName rule) {
  switch (rule) {
    case RuleName::kLinearAttention: return cpu::linear_attention_forms<float>();
    case RuleName::kKda: return cpu::kda_forms<float>();
    case RuleName::kGeneralizedDeltaRule: return cpu::generalized_delta_rule_forms<float>();
    case RuleName::kMomentumDeltaRule: break;
  }
  return cpu::momentum_delta_rule_forms<float>();
}

double ratio_of(std::span<const float> given, std::span<const double> exact) {
  ErrorRatio ratio;
  for (std::size_t i = 0; i < given.size(); ++i) ratio.add(given[i], exact[i]);
  return ratio.ratio();
}

/// The tolerance of every length holds at the end of a long one.
void check_along(const RuleCall<float>& call, const RuleOutputs& exact, std::int64_t values) {
  const auto window = static_cast<std::size_t>(kWindow * values);
  CHECK(ratio_of(std::span(call.o).first(window), std::span(exact.o).first(window)) <= 1e-5);
  CHECK(ratio_of(std::span(call.o).last(window), std::span(exact.o).last(window)) <= 1e-5);
  CHECK(ratio_of(call.final_state, exact.final_state) <= 1e-5);
}

TEST_CASE("numerics: no drift along twenty thousand tokens") {
  RuleCaseOptions options{
      .rule = GENERATE(RuleName::kLinearAttention, RuleName::kKda, RuleName::kGeneralizedDeltaRule,
                       RuleName::kMomentumDeltaRule),
      .shape = {1, kTokens, 1, 1, 8, 8}};
  options.reading_key = false;  // one that is not k can make the rule grow without bound
  RuleCase c(options);
  // Half-lives of some hundred thousand tokens. Linear attention, which overwrites nothing, is then
  // a sum of all tokens, and the rounding of a sum grows as the root of its length
  // (docs/numerics.md).
  const bool slow = GENERATE(false, true) && options.rule != RuleName::kLinearAttention;
  if (slow) {
    std::mt19937_64 random(3);
    std::uniform_real_distribution<double> uniform;
    for (double& g : c.inputs["g"]) g = static_cast<float>(-4e-6 * uniform(random));
  }
  if (options.rule == RuleName::kGeneralizedDeltaRule) {  // bounded, as RWKV-7 is
    for (std::size_t i = 0; i < c.inputs["b"].size(); ++i) c.inputs["b"][i] = -c.inputs["a"][i];
  }
  CAPTURE(static_cast<int>(options.rule), slow);
  const RuleOutputs exact = oracle(c);
  RuleCall<float> chunkwise(c);
  forms_of(options.rule).forward(chunkwise.params(), two_threads());
  check_along(chunkwise, exact, c.shape.V);
  RuleCall<float> recurrent(c);
  forms_of(options.rule).recurrent(recurrent.params(), core::serial_executor());
  check_along(recurrent, exact, c.shape.V);
}

TEST_CASE("numerics: no drift of the delta rules and their gradients") {
  CaseOptions options{.shape = {1, kTokens, 1, 1, 8, 8}};
  options.gated = GENERATE(false, true);
  options.gate_scale = 2e-6;
  options.beta_limit = GENERATE(1.0, 2.0);
  CAPTURE(options.gated, options.beta_limit);
  DeltaRuleCase<float> c(options);
  core::reference::forward(c.exact_params());
  core::reference::backward(c.exact_params(), c.exact_gradients());
  const auto& forms = cpu::gated_delta_rule_forms<float>();  // without g, the rule without a gate
  forms.forward(c.params(), two_threads());
  CHECK(error_ratio(c.o) <= 1e-5);
  CHECK(error_ratio(c.final_state) <= 1e-5);
  forms.backward(c.params(), c.gradients(), two_threads());
  for (const Rows* gradient : {&c.d_q, &c.d_k, &c.d_v, &c.d_beta}) {
    CHECK(error_ratio(*gradient) <= 1e-4);
  }
  if (options.gated) CHECK(error_ratio(c.d_g) <= 1e-4);
  CHECK(error_ratio(c.d_initial) <= 1e-4);
}

TEST_CASE("numerics: a constant gate near 0 does not drift, though nothing overwrites the state") {
  RuleCaseOptions options{
      .rule = GENERATE(RuleName::kLinearAttention, RuleName::kKda, RuleName::kGeneralizedDeltaRule,
                       RuleName::kMomentumDeltaRule),
      .shape = {1, 5 * kTokens, 1, 1, 8, 8}};
  options.reading_key = false;
  RuleCase c(options);
  const auto fill = [&](const char* name, double value) {
    const auto input = c.inputs.find(name);
    if (input == c.inputs.end()) return;
    std::fill(input->second.begin(), input->second.end(), value);
  };
  for (const char* name : {"k", "a", "b", "beta"}) fill(name, 0);
  fill("g", static_cast<double>(GENERATE(-1e-6F, -3e-5F)));
  fill("mu", static_cast<double>(1 - 1e-6F));
  CAPTURE(static_cast<int>(options.rule), c.inputs["g"][0]);
  const RuleOutputs exact = oracle(c);
  RuleCall<float> chunkwise(c);
  forms_of(options.rule).forward(chunkwise.params(), two_threads());
  check_along(chunkwise, exact, c.shape.V);
}

/// Gradients in fp32 of random weights of the outputs, against the oracle's.
void check_gradients(const RuleCase& c, const std::vector<const char*>& names) {
  std::mt19937_64 random(9);
  std::normal_distribution<double> normal;
  RuleOutputs weights;
  for (std::int64_t i = 0; i < c.output_size(); ++i) weights.o.push_back(normal(random));
  for (std::int64_t i = 0; i < c.state_size(); ++i) weights.final_state.push_back(normal(random));
  weights.final_momentum.assign(weights.final_state.size(), 0.0);
  const Tensors exact = gradient_oracle(c, weights);
  RuleCall<float> call(c);
  forms_of(c.options.rule).backward(call.params(), call.gradients(weights), two_threads());
  for (const char* name : names) {
    if (!exact.contains(name)) continue;
    CAPTURE(name);
    CHECK(ratio_of(call.gradients().at(name), exact.at(name)) <= 1e-4);
  }
}

TEST_CASE("numerics: no drift of the gradients of the rules with a gate for each channel") {
  RuleCaseOptions options{.rule = GENERATE(RuleName::kKda, RuleName::kGeneralizedDeltaRule),
                          .shape = {1, kTokens, 1, 1, 8, 8}};
  RuleCase c(options);
  std::mt19937_64 random(3);
  std::uniform_real_distribution<double> uniform;
  for (double& g : c.inputs["g"]) g = static_cast<float>(-4e-6 * uniform(random));
  if (options.rule == RuleName::kGeneralizedDeltaRule) {  // bounded, as RWKV-7 is
    for (std::size_t i = 0; i < c.inputs["b"].size(); ++i) c.inputs["b"][i] = -c.inputs["a"][i];
  }
  CAPTURE(static_cast<int>(options.rule));
  check_gradients(c, {"q", "k", "v", "g", "beta", "a", "b", "initial_state"});
}

TEST_CASE("numerics: gradients under constant gates near 0 do not drift, with nothing written") {
  RuleCaseOptions options{
      .rule = GENERATE(RuleName::kLinearAttention, RuleName::kKda, RuleName::kGeneralizedDeltaRule),
      .shape = {1, 5 * kTokens, 1, 1, 8, 8}};
  RuleCase c(options);
  for (const char* name : {"k", "a", "b"}) {
    const auto input = c.inputs.find(name);
    if (input != c.inputs.end()) std::fill(input->second.begin(), input->second.end(), 0.0);
  }
  const auto gate = static_cast<double>(GENERATE(-1e-6F, -3e-5F));
  std::fill(c.inputs["g"].begin(), c.inputs["g"].end(), gate);
  CAPTURE(static_cast<int>(options.rule), gate);
  check_gradients(c, {"q", "k", "g", "initial_state"});
}

TEST_CASE("numerics: constant gates of the gated delta rule and its gradients do not drift") {
  CaseOptions options{.shape = {1, 5 * kTokens, 1, 1, 8, 8}};
  options.gated = true;
  DeltaRuleCase<float> c(options);
  const double gate = GENERATE(-1e-6, -3e-5);
  c.g.fill([&] { return gate; });
  c.k.fill([] { return 0.0; });
  CAPTURE(gate);
  core::reference::forward(c.exact_params());
  core::reference::backward(c.exact_params(), c.exact_gradients());
  const auto& forms = cpu::gated_delta_rule_forms<float>();
  forms.forward(c.params(), two_threads());
  CHECK(error_ratio(c.o) <= 1e-5);
  CHECK(error_ratio(c.final_state) <= 1e-5);
  forms.backward(c.params(), c.gradients(), two_threads());
  for (const Rows* gradient : {&c.d_q, &c.d_k, &c.d_g}) {
    CHECK(error_ratio(*gradient) <= 1e-4);
  }
  CHECK(error_ratio(c.d_initial) <= 1e-4);
}

}  // namespace
}  // namespace fastweights::test
