#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>

#include "fastweights/core/error.hpp"
#include "fastweights/ops/fast_weight_memory.hpp"
#include "numerics.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using test::error_ratio;
using test::Tensors;

constexpr int64_t kHeads = 2;
constexpr int64_t kValueHeads = 4;
constexpr int64_t kKeySize = 12;
constexpr int64_t kValueSize = 20;
constexpr int64_t kTaps = 4;
constexpr double kEps = 1e-6;

enum Input {
  kQuery,
  kKey,
  kValue,
  kBeta,
  kDecay,
  kGate,
  kConvolution,
  kALog,
  kDtBias,
  kNorm,
  kState,
  kPast,
  kStrength  // only where a test adds it
};

Tensors random_inputs(int64_t tokens, at::ScalarType type = at::kFloat) {
  const auto keys = kHeads * kKeySize;
  const auto values = kValueHeads * kValueSize;
  const Tensors inputs{at::randn({2, tokens, keys}),
                       at::randn({2, tokens, keys}),
                       at::randn({2, tokens, values}),
                       at::randn({2, tokens, kValueHeads}),
                       at::randn({2, tokens, kValueHeads}),
                       at::randn({2, tokens, values}),
                       at::randn({2 * keys + values, kTaps}),
                       at::randn({kValueHeads}) * 0.3,
                       at::randn({kValueHeads}) - 2,
                       at::randn({kValueSize}),
                       at::randn({2, kValueHeads, kKeySize, kValueSize}),
                       at::randn({2, kTaps - 1, 2 * keys + values})};
  Tensors typed;
  for (const auto& input : inputs) typed.push_back(input.to(type));
  return typed;
}

FastWeightMemoryParams params(std::string_view rule, bool in_place = false) {
  return {kHeads, kValueHeads, 1.5, rule, kEps, in_place};
}

auto run(const Tensors& in, const FastWeightMemoryParams& p) {
  return fast_weight_memory(in[kQuery], in[kKey], in[kValue], in[kBeta], in[kDecay], in[kGate],
                            in[kConvolution], in[kALog], in[kDtBias], in[kNorm], in[kState],
                            in[kPast], p, {in.size() > kStrength ? in[kStrength] : Tensor(), {}});
}

Tensor unit(const Tensor& x) { return x * (x.square().sum(-1, true) + 1e-6).rsqrt(); }

/// The layer's arithmetic as the header states it, token by token. Returns o and the state.
std::pair<Tensor, Tensor> plain_memory(const Tensors& in, bool gated) {
  const auto tokens = in[kQuery].size(1);
  const auto inputs = at::cat({in[kPast], at::cat({in[kQuery], in[kKey], in[kValue]}, 2)}, 1);
  auto mixed = at::zeros({2, tokens, inputs.size(2)}, inputs.options());
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    mixed = mixed + inputs.narrow(1, tap, tokens) * in[kConvolution].select(1, tap);
  }
  mixed = at::silu(mixed);
  const auto keys = kHeads * kKeySize;
  const auto repeat = [](const Tensor& x) { return x.repeat_interleave(kValueHeads / kHeads, 2); };
  const auto q = repeat(unit(mixed.narrow(2, 0, keys).unflatten(2, {kHeads, -1})));
  const auto k = repeat(unit(mixed.narrow(2, keys, keys).unflatten(2, {kHeads, -1})));
  const auto v =
      mixed.narrow(2, 2 * keys, kValueHeads * kValueSize).unflatten(2, {kValueHeads, -1});
  const auto strength = in.size() > kStrength ? in[kStrength].unsqueeze(2) : at::ones({1, 1, 1});
  const auto beta = at::minimum(1.5 * at::sigmoid(in[kBeta]) * strength, at::full({}, 2.0));
  const auto g = -in[kALog].exp() * at::softplus(in[kDecay] + in[kDtBias]) *
                 at::minimum(strength, at::ones({}));
  auto state = in[kState];
  Tensors reads;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto key = k.select(1, t).unsqueeze(-1);
    if (gated) state = state * g.select(1, t).exp().unsqueeze(-1).unsqueeze(-1);
    const auto error = v.select(1, t) - (state * key).sum(-2);
    state = state + key * (beta.select(1, t).unsqueeze(-1) * error).unsqueeze(-2);
    reads.push_back((state * q.select(1, t).unsqueeze(-1)).sum(-2) / std::sqrt(double(kKeySize)));
  }
  const auto o = at::stack(reads, 1);
  const auto normed = o * (o.square().mean(-1, true) + kEps).rsqrt() * in[kNorm];
  const auto gate = at::silu(in[kGate]).unflatten(2, {kValueHeads, -1});
  return {(normed * gate).flatten(2), state};
}

TEST_CASE("fast_weight_memory is its definition, with every gradient") {
  torch::manual_seed(1);
  const bool gated = GENERATE(true, false);
  const auto type = GENERATE(at::kDouble, at::kFloat);
  const int64_t tokens = GENERATE(1, 3, 70);
  CAPTURE(gated, type, tokens);
  const auto p = params(gated ? "gated_delta_rule" : "delta_rule");
  const auto inputs = random_inputs(tokens);
  const auto output =
      test::compare([&](const Tensors& in) { return std::get<0>(run(in, p)); },
                    [&](const Tensors& in) { return plain_memory(in, gated).first; }, inputs, type);
  CHECK(output.output < test::tolerance(type).output);
  CHECK(output.gradient < test::tolerance(type).gradient);
  const auto state = test::compare(
      [&](const Tensors& in) { return std::get<1>(run(in, p)); },
      [&](const Tensors& in) { return plain_memory(in, gated).second; }, inputs, type);
  CHECK(state.output < test::tolerance(type).output);
  CHECK(state.gradient < test::tolerance(type).gradient);
}

TEST_CASE("write strengths are their definition, with every gradient") {
  torch::manual_seed(6);
  const bool gated = GENERATE(true, false);
  const int64_t tokens = GENERATE(1, 5, 70);
  CAPTURE(gated, tokens);
  const auto p = params(gated ? "gated_delta_rule" : "delta_rule");
  auto inputs = random_inputs(tokens);
  inputs.push_back(at::rand({2, tokens}) * 2);
  for (const auto output : {0, 1}) {
    const auto errors = test::compare(
        [&](const Tensors& in) {
          const auto [o, state, past] = run(in, p);
          return output == 0 ? o : state;
        },
        [&](const Tensors& in) {
          const auto [o, state] = plain_memory(in, gated);
          return output == 0 ? o : state;
        },
        inputs, at::kDouble);
    CHECK(errors.output < test::tolerance(at::kDouble).output);
    CHECK(errors.gradient < test::tolerance(at::kDouble).gradient);
  }
}

TEST_CASE("a strength of one changes no bit, one of zero leaves the fast weights to the bit") {
  torch::manual_seed(7);
  const bool gated = GENERATE(true, false);
  const bool in_place = GENERATE(true, false);
  const int64_t tokens = GENERATE(1, 7, 70);
  CAPTURE(gated, in_place, tokens);
  const auto p = params(gated ? "gated_delta_rule" : "delta_rule", in_place);
  auto inputs = random_inputs(tokens);
  const auto state = inputs[kState];
  const auto with = [&](double strength) {
    auto in = inputs;
    in[kState] = state.clone();
    if (strength >= 0) in.push_back(at::full({2, tokens}, strength));
    return run(in, p);
  };
  const auto [o, next, past] = with(-1);
  const auto [o_one, next_one, past_one] = with(1);
  CHECK(o.equal(o_one));
  CHECK(next.equal(next_one));
  const auto [o_zero, next_zero, past_zero] = with(0);
  CHECK(next_zero.equal(state));
  CHECK(past_zero.equal(past));
  CHECK_FALSE(o_zero.equal(o));  // a token sees its own write

  inputs[kALog].fill_(200.0);  // gates of −∞ forget everything, but for a token that is not learned
  CHECK(std::get<1>(with(0)).equal(state));
  CHECK(std::get<1>(with(0.5)).isfinite().all().item<bool>());
}

TEST_CASE("gates of minus infinity have no NaN in the gradients of strengths") {
  torch::manual_seed(8);
  auto inputs = random_inputs(6, at::kDouble);
  inputs[kALog].fill_(1000.0);
  inputs.push_back(at::tensor({0.0, 1.0, 0.5, 0.0, 2.0, 1.0}, at::kDouble).expand({2, 6}).clone());
  for (auto& input : inputs) input.requires_grad_();
  const auto [o, state, past] = run(inputs, params("gated_delta_rule"));
  (o.sum() + state.sum()).backward();
  for (const auto index : {kQuery, kValue, kBeta, kState, kStrength}) {
    CAPTURE(index);
    CHECK(inputs[index].grad().isfinite().all().item<bool>());
  }
}

TEST_CASE("strengths beyond the stable range are limited and counted") {
  torch::manual_seed(9);
  auto inputs = random_inputs(9);
  const auto strength = at::full({2, 9}, 2.0);
  const auto wanted = 1.5 * at::sigmoid(inputs[kBeta]) * 2.0;
  const auto limited = at::full({1}, 100, at::kLong);
  const auto call = [&](const Tensors& in, const WriteStrength& write) {
    return std::get<1>(fast_weight_memory(in[kQuery], in[kKey], in[kValue], in[kBeta], in[kDecay],
                                          in[kGate], in[kConvolution], in[kALog], in[kDtBias],
                                          in[kNorm], in[kState], in[kPast],
                                          params("gated_delta_rule"), write));
  };
  const auto state = call(inputs, {strength, limited});
  const auto count = (wanted > 2.0).sum().item<int64_t>();
  CHECK(count > 0);
  CHECK(limited.item<int64_t>() == 100 + count);
  // The same β, reached without a limit: 2 for the largest of them.
  inputs[kBeta] = at::logit(wanted.clamp_max(2.0) / 3.0);
  CHECK(error_ratio(state, call(inputs, {strength, limited})) < 1e-5);
}

TEST_CASE("fast_weight_memory in pieces is one call") {
  torch::manual_seed(2);
  const int64_t piece = GENERATE(1, 7, 8, 9, 128, 1000);
  const bool in_place = GENERATE(false, true);
  const auto* rule = GENERATE("gated_delta_rule", "delta_rule");
  CAPTURE(piece, in_place, rule);
  const at::NoGradGuard no_grad;
  auto inputs = random_inputs(400);
  const auto [whole, state, past] = run(inputs, params(rule));
  inputs[kState] = inputs[kState].clone();
  Tensors parts;
  for (int64_t begin = 0; begin < 400; begin += piece) {
    auto part = inputs;
    for (int i = kQuery; i <= kGate; ++i) {
      part[i] = inputs[i].narrow(1, begin, std::min<int64_t>(piece, 400 - begin));
    }
    auto [o, next, next_past] = run(part, params(rule, in_place));
    inputs[kState] = next;
    inputs[kPast] = next_past;
    parts.push_back(o);
  }
  CHECK(error_ratio(at::cat(parts, 1), whole) < 1e-5);
  CHECK(error_ratio(inputs[kState], state) < 1e-5);
  CHECK(inputs[kPast].equal(past));
}

TEST_CASE("no tokens leave the states as they were") {
  torch::manual_seed(3);
  const bool in_place = GENERATE(false, true);
  const auto inputs = random_inputs(0);
  const auto [o, state, past] = run(inputs, params("gated_delta_rule", in_place));
  CHECK(o.sizes() == at::IntArrayRef({2, 0, kValueHeads * kValueSize}));
  CHECK(state.equal(inputs[kState]));
  CHECK(past.equal(inputs[kPast]));
}

TEST_CASE("states left out are zero; delta_rule needs no decay") {
  torch::manual_seed(4);
  auto inputs = random_inputs(9);
  inputs[kState].zero_();
  inputs[kPast].zero_();
  const auto expected = std::get<0>(run(inputs, params("delta_rule")));
  const auto o = std::get<0>(fast_weight_memory(
      inputs[kQuery], inputs[kKey], inputs[kValue], inputs[kBeta], {}, inputs[kGate],
      inputs[kConvolution], {}, {}, inputs[kNorm], {}, {}, params("delta_rule")));
  CHECK(o.equal(expected));
}

TEST_CASE("16-bit inputs keep gates and state in fp32") {
  torch::manual_seed(5);
  auto inputs = random_inputs(50);
  for (int i = kQuery; i <= kGate; ++i) inputs[i] = inputs[i].to(at::kBFloat16);
  const auto [o, state, past] = run(inputs, params("gated_delta_rule"));
  CHECK(o.scalar_type() == at::kBFloat16);
  CHECK(state.scalar_type() == at::kFloat);
  Tensors wide;
  for (const auto& input : inputs) wide.push_back(input.to(at::kDouble));
  const auto [wide_o, wide_state] = plain_memory(wide, true);
  CHECK(error_ratio(o, wide_o) < 2e-2);  // several roundings to bf16 on the way
  CHECK(error_ratio(state, wide_state) < 1e-2);
}

TEST_CASE("fast_weight_memory names what does not fit") {
  using Catch::Matchers::ContainsSubstring;
  using Catch::Matchers::MessageMatches;
  const auto good = random_inputs(5);
  const auto p = params("gated_delta_rule");
  const auto throws_with = [&](size_t index, const Tensor& wrong, const char* text) {
    auto inputs = good;
    inputs[index] = wrong;
    CHECK_THROWS_MATCHES(run(inputs, p), ShapeError, MessageMatches(ContainsSubstring(text)));
  };
  throws_with(kKey, at::randn({2, 5, 22}),
              "key must be [B, T, H * K] = [2, 5, 24], got [2, 5, 22]");
  throws_with(kBeta, at::randn({2, 5, 3}), "beta must be [B, T, HV] = [2, 5, 4], got [2, 5, 3]");
  throws_with(kDecay, at::randn({2, 5, 2}), "decay must be [B, T, HV] = [2, 5, 4]");
  throws_with(kGate, at::randn({2, 5, 79}), "gate must be [B, T, HV * V] = [2, 5, 80]");
  throws_with(kALog, at::randn({3}), "a_log must be [HV] = [4], got [3]");
  throws_with(kConvolution, at::randn({10, 4}), "convolution_weight must be");
  throws_with(kState, at::randn({2, 4, 20, 12}), "state must be [B, HV, K, V] = [2, 4, 12, 20]");
  throws_with(kPast, at::randn({2, 4, 128}), "conv must be [B, W - 1, 2 * H * K + HV * V]");
  CHECK_THROWS_MATCHES(run(good, params("oja")), ShapeError,
                       MessageMatches(ContainsSubstring("got \"oja\"")));
  CHECK_THROWS_MATCHES(
      fast_weight_memory(good[kQuery], good[kKey], good[kValue], good[kBeta], {}, good[kGate],
                         good[kConvolution], {}, {}, good[kNorm], {}, {}, p),
      ShapeError, MessageMatches(ContainsSubstring("decay is needed by the rule")));
}

}  // namespace
}  // namespace fastweights
