#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <random>
#include <vector>

#include "executors.hpp"
#include "gradient_check.hpp"
#include "softmax_delta_rule_case.hpp"

namespace fastweights::test {
namespace {

template <class Real>
void check_forward(const SoftmaxCase& c, double tolerance) {
  const SoftmaxOutputs exact = oracle(c);
  const auto& rule = cpu::softmax_delta_rule_forms<Real>();
  SoftmaxCall<Real> call(c), alone(c), in_place(c);
  rule.forward(call.params(), two_threads());
  CHECK(error_ratio(call.corrected, exact.corrected) <= tolerance);
  CHECK(error_ratio(call.final_state, exact.final_state) <= tolerance);
  rule.forward(alone.params(), core::serial_executor());
  CHECK(alone.corrected == call.corrected);
  CHECK(alone.final_state == call.final_state);
  if (!c.options.initial_state) return;
  auto params = in_place.params();
  std::copy_n(params.initial_state, in_place.final_state.size(), params.final_state);
  params.initial_state = params.final_state;
  rule.forward(params, core::serial_executor());
  CHECK(in_place.corrected == call.corrected);
  CHECK(in_place.final_state == call.final_state);
}

/// Random weights of a loss that is linear in both outputs.
SoftmaxOutputs loss_weights(const SoftmaxCase& c) {
  std::mt19937_64 random(c.options.seed + 100);
  std::normal_distribution<double> normal;
  SoftmaxOutputs weights = oracle(c);
  for (auto* values : {&weights.corrected, &weights.final_state}) {
    for (double& value : *values) value = normal(random);
  }
  return weights;
}

double loss(const SoftmaxCase& c, const SoftmaxOutputs& weights) {
  const SoftmaxOutputs out = oracle(c);
  double sum = 0;
  for (std::size_t i = 0; i < out.corrected.size(); ++i) {
    sum += out.corrected[i] * weights.corrected[i];
  }
  for (std::size_t i = 0; i < out.final_state.size(); ++i) {
    sum += out.final_state[i] * weights.final_state[i];
  }
  return sum;
}

template <class Real>
std::map<std::string, std::vector<Real>> gradients(const SoftmaxCase& c,
                                                   const core::Executor& executor) {
  SoftmaxCall<Real> call(c);
  cpu::softmax_delta_rule_forms<Real>().forward(call.params(), executor);
  return call.gradients(loss_weights(c), executor);
}

/// Each input's gradient against the oracle's central difference along a random direction.
void check_backward(const SoftmaxCase& c) {
  const SoftmaxOutputs weights = loss_weights(c);
  const auto exact = gradients<double>(c, two_threads());
  CHECK(gradients<double>(c, core::serial_executor()) == exact);
  check_differences(c, exact, [&](const SoftmaxCase& moved) { return loss(moved, weights); });
  for (const auto& [name, gradient] : gradients<float>(c, two_threads())) {
    CAPTURE(name);
    if (c.inputs.contains(name)) CHECK(error_ratio(gradient, exact.at(name)) <= 1e-4);
  }
}

TEST_CASE("softmax delta rule: outputs and states against the oracle") {
  SoftmaxCaseOptions options;
  options.T = GENERATE(0, 1, 2, 15, 16, 17, 33, 100);
  const auto [batch, width, vocabulary] =
      GENERATE(std::array<std::int64_t, 3>{1, 60, 100}, std::array<std::int64_t, 3>{3, 128, 33},
               std::array<std::int64_t, 3>{1, 1, 300}, std::array<std::int64_t, 3>{2, 65, 1});
  options.B = batch;
  options.D = width;
  options.N = vocabulary;
  options.pending = options.T % 2 == 1;
  options.gate = options.T != 16;
  options.initial_state = options.T != 17;
  options.unknown = options.T == 33 ? 0.3 : 0.0;
  options.unwritten = options.T == 33 ? 0.2 : 0.0;
  options.forgetting = options.T == 100 ? 0.05 : 0.0;
  options.seed = static_cast<std::uint64_t>(options.T) + 1;
  CAPTURE(options.B, options.T, options.D, options.N);
  const SoftmaxCase c(options);
  check_forward<double>(c, 1e-12);
  check_forward<float>(c, 1e-5);
}

TEST_CASE("softmax delta rule: gradients against differences of the oracle") {
  SoftmaxCaseOptions options{.B = 2, .T = GENERATE(1, 9, 40, 100), .D = 6, .N = 10};
  options.pending = GENERATE(false, true);
  options.gate = options.T != 9;
  options.initial_state = options.T != 40;
  options.unknown = options.T == 40 ? 0.3 : 0.0;
  options.unwritten = options.T == 100 ? 0.2 : 0.0;
  CAPTURE(options.T, options.pending);
  check_backward(SoftmaxCase(options));
}

TEST_CASE("softmax delta rule: gradients of a wide state") {
  check_backward(SoftmaxCase({.T = 40, .D = 131, .N = 270}));
}

TEST_CASE("softmax delta rule: gates of minus infinity have gradients of zero") {
  SoftmaxCase c({.T = 50, .D = 20, .N = 30, .forgetting = 0.2});
  for (const auto& [name, gradient] : gradients<float>(c, core::serial_executor())) {
    CAPTURE(name);
    CHECK(std::all_of(gradient.begin(), gradient.end(), [](float x) { return std::isfinite(x); }));
    if (name != "g") continue;
    for (std::size_t t = 0; t < gradient.size(); ++t) {
      if (std::isinf(c.inputs["g"][t])) CHECK(gradient[t] == 0.0F);
    }
  }
}

TEST_CASE("softmax delta rule: what is not written leaves the state as it was, bit for bit") {
  SoftmaxCase c({.T = 40, .D = 20, .N = 30});
  std::fill(c.inputs["eta"].begin(), c.inputs["eta"].end(), 0.0);
  const bool gated = GENERATE(false, true);
  if (gated) {
    std::fill(c.target.begin(), c.target.end(), -1);
  } else {
    std::fill(c.inputs["g"].begin(), c.inputs["g"].end(), 0.0);
    c.inputs["logits"][5] = std::numeric_limits<double>::quiet_NaN();
  }
  SoftmaxCall<float> call(c);
  const auto params = call.params();
  cpu::softmax_delta_rule_forms<float>().forward(params, core::serial_executor());
  CHECK(std::equal(call.final_state.begin(), call.final_state.end(), params.initial_state));
}

TEST_CASE("softmax delta rule: slow decays keep their digits over many tokens") {
  SoftmaxCase c({.T = 20000, .D = 3, .N = 4});
  std::fill(c.inputs["eta"].begin(), c.inputs["eta"].end(), 0.0);
  std::fill(c.inputs["g"].begin(), c.inputs["g"].end(), -1e-6);
  SoftmaxCall<float> call(c);
  cpu::softmax_delta_rule_forms<float>().forward(call.params(), core::serial_executor());
  CHECK(error_ratio(call.final_state, oracle(c).final_state) <= 1e-5);
}

TEST_CASE("softmax delta rule: logits that are masked stay masked") {
  SoftmaxCase c({.T = 40, .D = 20, .N = 30});
  for (std::size_t i = 0; i < c.inputs["logits"].size(); i += 30) {
    c.inputs["logits"][i + 7] = -std::numeric_limits<double>::infinity();
  }
  for (auto& target : c.target) target += target == 7 ? 1 : 0;
  const SoftmaxOutputs exact = oracle(c);
  SoftmaxCall<float> call(c);
  cpu::softmax_delta_rule_forms<float>().forward(call.params(), core::serial_executor());
  CHECK(error_ratio(call.final_state, exact.final_state) <= 1e-5);
  CHECK(call.corrected[37] == -std::numeric_limits<float>::infinity());
}

}  // namespace
}  // namespace fastweights::test
