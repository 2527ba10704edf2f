#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <vector>

#include "delta_rule_case.hpp"
#include "executors.hpp"
#include "fastweights/core/cpu.hpp"
#include "fastweights/core/delta_rule.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/core/gated_delta_rule.hpp"
#include "fastweights/core/reference.hpp"

namespace fastweights::test {
namespace {

using core::DType;

struct Tolerance {
  double output;
  double gradient;
};

/// Design §7; the 16-bit gradients as flash-linear-attention tests its own.
Tolerance tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return {1e-12, 1e-11};
    case DType::kFloat32: return {1e-5, 1e-4};
    default: return {5e-3, 8e-3};
  }
}

template <class Real>
void run_forward(const core::RuleParams<Real>& params, bool gated) {
  gated ? cpu::gated_delta_rule(params, two_threads()) : cpu::delta_rule(params, two_threads());
}

template <class Real>
void check_against_oracle(const CaseOptions& options) {
  CAPTURE(options.shape.T, options.shape.K, options.shape.V, options.shape.HV, options.gated,
          options.use_qk_l2norm, static_cast<int>(options.dtype), options.gate_scale, options.seed);
  const auto [output, gradient] = tolerance(options.dtype);
  DeltaRuleCase<Real> c(options);
  core::reference::forward(c.exact_params());
  core::reference::backward(c.exact_params(), c.exact_gradients());

  run_forward(c.params(), options.gated);
  CHECK(error_ratio(c.o) <= output);
  CHECK(error_ratio(c.final_state) <= output);
  CHECK(c.o.gaps_untouched());

  DeltaRuleCase<Real> recurrent(options);
  core::reference::forward(recurrent.exact_params());
  if (options.gated) {
    cpu::gated_delta_rule_recurrent(recurrent.params(), two_threads());
  } else {
    cpu::delta_rule_recurrent(recurrent.params(), two_threads());
  }
  CHECK(error_ratio(recurrent.o) <= output);
  CHECK(error_ratio(recurrent.final_state) <= output);

  if (options.gated) {
    cpu::gated_delta_rule_backward(c.params(), c.gradients(), two_threads());
    CHECK(error_ratio(c.d_g) <= gradient);
    CHECK(c.d_g.gaps_untouched());
  } else {
    cpu::delta_rule_backward(c.params(), c.gradients(), two_threads());
  }
  CHECK(error_ratio(c.d_q) <= gradient);
  CHECK(error_ratio(c.d_k) <= gradient);
  CHECK(error_ratio(c.d_v) <= gradient);
  CHECK(error_ratio(c.d_beta) <= (gradient < 5e-3 ? gradient : 2e-2));
  CHECK(error_ratio(c.d_initial) <= gradient);
  CHECK(c.d_q.gaps_untouched());
  CHECK(c.d_k.gaps_untouched());
  CHECK(c.d_v.gaps_untouched());
}

void check_dtype(const CaseOptions& options) {
  if (options.dtype == DType::kFloat64) {
    check_against_oracle<double>(options);
  } else {
    check_against_oracle<float>(options);
  }
}

TEST_CASE("the delta rules agree with the oracle at every length", "[delta_rule]") {
  const auto tokens = GENERATE(0, 1, 7, 8, 31, 33, 63, 64, 65, 200);
  const bool gated = GENERATE(false, true);
  const auto dtype = GENERATE(DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16);
  check_dtype(
      {.shape = {2, tokens, 1, 2, 20, 36}, .dtype = dtype, .gated = gated, .use_qk_l2norm = true});
}

TEST_CASE("a few tokens go through the state together, however many", "[delta_rule]") {
  const auto tokens = GENERATE(2, 3, 4, 5, 6, 7, 9, 10, 63, 70);
  const bool gated = GENERATE(false, true);
  const auto dtype = GENERATE(DType::kFloat64, DType::kFloat32);
  check_dtype({.shape = {1, tokens, 1, 2, 20, 64}, .dtype = dtype, .gated = gated});
}

TEST_CASE("the delta rules agree with the oracle at every head size", "[delta_rule]") {
  const auto keys = GENERATE(1, 3, 60, 100, 256);
  const auto values = GENERATE(1, 17, 64, 100, 256);
  check_dtype({.shape = {1, 70, 1, 1, keys, values}, .dtype = DType::kFloat32});
}

TEST_CASE("grouped values share their key head", "[delta_rule]") {
  const auto heads = GENERATE(1, 2, 3);
  const auto group = GENERATE(1, 2, 4);
  const auto dtype = GENERATE(DType::kFloat64, DType::kBFloat16);
  check_dtype(
      {.shape = {2, 67, heads, heads * group, 32, 24}, .dtype = dtype, .use_qk_l2norm = true});
}

TEST_CASE("packed sequences, some of them empty, keep to themselves", "[delta_rule]") {
  const auto dtype = GENERATE(DType::kFloat64, DType::kFloat32);
  const bool initial_state = GENERATE(false, true);
  check_dtype({.shape = {1, 150, 2, 4, 16, 32},
               .dtype = dtype,
               .cu_seqlens = {0, 0, 15, 15, 80, 149, 150, 150},
               .initial_state = initial_state});
}

TEST_CASE("gates from none to very strong", "[delta_rule]") {
  const auto gate_scale = GENERATE(0.0, 1e-6, 0.01, 1.0, 10.0, 50.0);
  check_dtype(
      {.shape = {1, 130, 1, 2, 32, 32}, .dtype = DType::kFloat32, .gate_scale = gate_scale});
}

TEST_CASE("a gate of minus infinity forgets exactly and leaves no NaN", "[delta_rule]") {
  constexpr double kForget = -std::numeric_limits<double>::infinity();
  CaseOptions options{.shape = {1, 100, 1, 1, 16, 16}, .dtype = DType::kFloat32};
  DeltaRuleCase<float> c(options);
  std::size_t token = 0;
  c.g.each([&](std::size_t i) {
    if (token++ % 9 == 0) c.g.set(i, kForget);
  });
  core::reference::forward(c.exact_params());
  core::reference::backward(c.exact_params(), c.exact_gradients());
  run_forward(c.params(), true);
  cpu::gated_delta_rule_backward(c.params(), c.gradients(), two_threads());
  CHECK(error_ratio(c.o) <= 1e-5);
  CHECK(error_ratio(c.final_state) <= 1e-5);
  CHECK(error_ratio(c.d_g) <= 1e-4);
  CHECK(error_ratio(c.d_k) <= 1e-4);
  for (const float gradient : c.d_initial.values) CHECK(gradient == 0.0f);
}

TEST_CASE("gradients beyond one segment of recomputed states", "[delta_rule]") {
  check_dtype({.shape = {1, 4500, 1, 1, 8, 8}, .dtype = DType::kFloat64, .gate_scale = 0.01});
}

TEST_CASE("results do not depend on how the work is cut", "[delta_rule]") {
  const CaseOptions options{.shape = {1, 100, 1, 1, 64, 200}, .dtype = DType::kFloat32};
  DeltaRuleCase<float> one(options);
  DeltaRuleCase<float> many(options);
  cpu::gated_delta_rule(one.params(), core::serial_executor());
  auto executor = core::serial_executor();
  executor.threads = 7;
  cpu::gated_delta_rule(many.params(), executor);
  CHECK(one.final_state.values == many.final_state.values);
  one.o.each([&](std::size_t i) { CHECK(one.o.get(i) == many.o.get(i)); });
}

TEST_CASE("the header-only kernels agree with the oracle", "[delta_rule]") {
  const CaseOptions options{.shape = {1, 90, 1, 2, 24, 40}, .dtype = DType::kFloat32};
  DeltaRuleCase<float> c(options);
  core::reference::forward(c.exact_params());
  core::reference::backward(c.exact_params(), c.exact_gradients());
  core::gated_delta_rule(c.params());
  core::gated_delta_rule_backward(c.params(), c.gradients());
  CHECK(error_ratio(c.o) <= 1e-5);
  CHECK(error_ratio(c.d_k) <= 1e-4);
  core::gated_delta_rule_recurrent(c.params());
  CHECK(error_ratio(c.o) <= 1e-5);
  core::delta_rule(c.params());
  CHECK(error_ratio(c.o) > 1e-2);  // the gate was dropped, and it matters
}

TEST_CASE("the oracle's gradients are those of its outputs", "[delta_rule]") {
  CaseOptions options{.shape = {1, 5, 1, 2, 3, 4}, .dtype = DType::kFloat64};
  options.use_qk_l2norm = GENERATE(false, true);
  DeltaRuleCase<double> c(options);
  const auto loss = [&] {
    core::reference::forward(c.exact_params());
    double sum = 0;
    c.o.each([&](std::size_t i) { sum += c.o.exact(i) * c.d_o.exact(i); });
    for (std::size_t i = 0; i < c.final_state.exact.size(); ++i) {
      sum += c.final_state.exact[i] * c.d_final.exact[i];
    }
    return sum;
  };
  core::reference::backward(c.exact_params(), c.exact_gradients());
  constexpr double kStep = 1e-6;
  const auto check = [&](Rows& input, const Rows& gradient) {
    input.each([&](std::size_t i) {
      const double value = input.exact(i);
      input.set(i, value + kStep);
      const double above = loss();
      input.set(i, value - kStep);
      const double below = loss();
      input.set(i, value);
      CHECK(std::abs((above - below) / (2 * kStep) - gradient.exact(i)) <= 1e-7);
    });
  };
  check(c.q, c.d_q);
  check(c.k, c.d_k);
  check(c.v, c.d_v);
  check(c.beta, c.d_beta);
  check(c.g, c.d_g);
  for (std::size_t i = 0; i < c.initial.exact.size(); ++i) {
    const double value = c.initial.exact[i];
    c.initial.exact[i] = value + kStep;
    const double above = loss();
    c.initial.exact[i] = value - kStep;
    const double below = loss();
    c.initial.exact[i] = value;
    CHECK(std::abs((above - below) / (2 * kStep) - c.d_initial.exact[i]) <= 1e-7);
  }
}

TEST_CASE("calls that make no sense are refused by name", "[delta_rule]") {
  const auto message = [](CaseOptions options, auto change) {
    DeltaRuleCase<float> c(options);
    auto params = c.params();
    change(params);
    try {
      cpu::gated_delta_rule(params, core::serial_executor());
    } catch (const ShapeError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  const CaseOptions options{.shape = {1, 4, 2, 2, 8, 8}};
  CHECK(message(options, [](auto& p) { p.shape.K = 257; }) ==
        "gated_delta_rule: K must be from 1 to 256, got 257");
  CHECK(message(options, [](auto& p) { p.shape.V = 0; }) ==
        "gated_delta_rule: V must be from 1 to 256, got 0");
  CHECK(message(options, [](auto& p) { p.shape.HV = 3; }) ==
        "gated_delta_rule: HV must be a positive multiple of H = 2, got 3");
  CHECK(message(options, [](auto& p) { p.shape.T = -1; }) ==
        "gated_delta_rule: T must be at least 0, got -1");
  CHECK(message(options, [](auto& p) { p.g = {}; }) == "gated_delta_rule: g is missing");
  static constexpr std::int64_t kShort[] = {0, 3};
  static constexpr std::int64_t kDown[] = {0, 3, 2, 4};
  CHECK(message(options, [](auto& p) { p.cu_seqlens = kShort; }) ==
        "gated_delta_rule: cu_seqlens must begin with 0 and end with T = 4, got 0 and 3");
  CHECK(message(options, [](auto& p) { p.cu_seqlens = kDown; }) ==
        "gated_delta_rule: cu_seqlens must not decrease, got 3 before 2");
}

}  // namespace
}  // namespace fastweights::test
