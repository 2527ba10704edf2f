#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>

#include "fastweights/core/error.hpp"
#include "fastweights/ops/sliding_window_attention.hpp"
#include "numerics.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using test::error_ratio;
using test::Tensors;

constexpr double kBase = 10000.0;

/// Angles [B, T, pairs] in fp64.
Tensor angles(const Tensor& position, int64_t tokens, int64_t size, double base) {
  const auto pairs = size / 4;
  const auto frequency = at::pow(base, -at::arange(pairs, at::kDouble) / pairs);
  const auto index = position.unsqueeze(1) + at::arange(tokens);
  return index.to(at::kDouble).unsqueeze(-1) * frequency;
}

/// x [B, T, heads, D] with its first half rotated.
Tensor plain_rotation(const Tensor& x, const Tensor& position, double base = kBase) {
  const auto quarter = x.size(3) / 4;
  const auto angle = angles(position, x.size(1), x.size(3), base).unsqueeze(2);
  const auto c = angle.cos().to(x.scalar_type());
  const auto s = angle.sin().to(x.scalar_type());
  const auto a = x.narrow(3, 0, quarter);
  const auto b = x.narrow(3, quarter, quarter);
  return at::cat({a * c - b * s, b * c + a * s, x.narrow(3, 2 * quarter, 2 * quarter)}, 3);
}

/// A call's tensors: query, key, value, sink_key, sink_value, cache_key, cache_value.
struct Case {
  int64_t heads = 2;
  int64_t window = 16;
  Tensor position;
};

Tensors random_inputs(const Case& c, int64_t tokens, int64_t size, int64_t sinks) {
  const auto batch = c.position.size(0);
  const auto width = c.heads * size;
  return {at::randn({batch, tokens, width}),          at::randn({batch, tokens, width}),
          at::randn({batch, tokens, width}),          at::randn({c.heads, sinks, size / 2}),
          at::randn({c.heads, sinks, size}),          at::randn({batch, c.window, c.heads, size}),
          at::randn({batch, c.window, c.heads, size})};
}

/// Rows of the ring that hold the `count` tokens before `position`.
Tensor newest(const Tensor& ring, int64_t position, int64_t count) {
  return ring.index_select(0, at::arange(position - count, position).remainder(ring.size(0)));
}

/// One batch row by the definition: every score, then a mask.
Tensor plain_row(const Tensors& in, const Case& c, int64_t row) {
  const auto tokens = in[0].size(1);
  const auto split = [&](const Tensor& x) { return x.unflatten(2, {c.heads, -1}); };
  const auto q = plain_rotation(split(in[0]), c.position)[row];
  const auto k = plain_rotation(split(in[1]), c.position)[row];
  const auto sinks = in[3].size(1);
  const auto position = c.position[row].item<int64_t>();
  const auto past = std::min(position, c.window - 1);
  const auto sink_key = at::cat({at::zeros_like(in[3]), in[3]}, -1).transpose(0, 1);
  const auto keys = at::cat({sink_key, newest(in[5][row], position, past), k});
  const auto values =
      at::cat({in[4].transpose(0, 1), newest(in[6][row], position, past), split(in[2])[row]});
  const auto scale = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
  const auto scores = at::einsum("thd,nhd->htn", {q, keys}) * scale;
  const auto i = at::arange(tokens).unsqueeze(1) + past;
  const auto j = at::arange(keys.size(0)) - sinks;
  const auto seen = j.le(i).logical_and(j.gt(i - c.window)).logical_or(j.lt(0));
  const auto weights = scores.masked_fill(seen.logical_not(), -1e30).softmax(-1);
  return at::einsum("htn,nhd->thd", {weights, values}).flatten(1);
}

Tensor plain_attention(const Tensors& in, const Case& c) {
  Tensors rows;
  for (int64_t row = 0; row < in[0].size(0); ++row) rows.push_back(plain_row(in, c, row));
  return at::stack(rows);
}

auto attend(const Tensors& in, const Case& c, bool in_place = false) {
  return sliding_window_attention(in[0], in[1], in[2], in[3], in[4], in[5], in[6], c.position,
                                  {c.heads, c.window, kBase, in_place});
}

TEST_CASE("sliding_window_attention is its definition, with gradients, rows at any position") {
  torch::manual_seed(1);
  const auto type = GENERATE(at::kDouble, at::kFloat, at::kBFloat16);
  const int64_t window = GENERATE(2, 16, 128, 300);
  const int64_t sinks = GENERATE(0, 1, 3);
  const int64_t tokens = GENERATE(0, 1, 5, 40, 290);
  CAPTURE(type, window, sinks, tokens);
  const Case c{2, window, at::tensor({int64_t{0}, int64_t{3}, int64_t{1000}})};
  const auto inputs = random_inputs(c, tokens, 20, sinks);
  const auto errors =
      test::compare([&](const Tensors& in) { return std::get<0>(attend(in, c)); },
                    [&](const Tensors& in) { return plain_attention(in, c); }, inputs, type);
  CHECK(errors.output < test::tolerance(type).output);
  CHECK(errors.gradient < test::tolerance(type).gradient);
}

TEST_CASE("windows of one token see that token and the sinks") {
  torch::manual_seed(2);
  const Case c{2, 1, at::tensor({int64_t{0}, int64_t{9}})};
  const auto inputs = random_inputs(c, 7, 8, 0);
  CHECK(std::get<0>(attend(inputs, c)).equal(inputs[2]));
  const auto with_sink = random_inputs(c, 7, 8, 2);
  CHECK(error_ratio(std::get<0>(attend(with_sink, c)), plain_attention(with_sink, c)) < 1e-5);
}

TEST_CASE("the ring holds rotated keys and values in the slots of their tokens") {
  torch::manual_seed(3);
  const int64_t tokens = GENERATE(0, 1, 5, 16, 100);
  const bool in_place = GENERATE(false, true);
  CAPTURE(tokens, in_place);
  const Case c{2, 16, at::tensor({int64_t{0}, int64_t{13}})};
  auto inputs = random_inputs(c, tokens, 8, 1);
  auto expected_key = inputs[5].clone();
  auto expected_value = inputs[6].clone();
  const auto rotated = plain_rotation(inputs[1].unflatten(2, {2, -1}), c.position);
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t t = 0; t < tokens; ++t) {
      const auto slot = (c.position[row].item<int64_t>() + t) % c.window;
      expected_key[row][slot].copy_(rotated[row][t]);
      expected_value[row][slot].copy_(inputs[2][row][t].view({2, 8}));
    }
  }
  const auto before = inputs[5].clone();
  const at::NoGradGuard no_grad;
  const auto [o, key, value] = attend(inputs, c, in_place);
  CHECK(error_ratio(key, expected_key) < 1e-6);
  CHECK(value.equal(expected_value));
  CHECK(key.is_same(inputs[5]) == in_place);
  if (!in_place) CHECK(inputs[5].equal(before));
}

TEST_CASE("a row at position 0 does not see what its ring holds") {
  torch::manual_seed(4);
  const int64_t tokens = GENERATE(1, 9, 40);
  const Case c{2, 16, at::zeros({2}, at::kLong)};
  auto inputs = random_inputs(c, tokens, 8, 1);
  const auto o = std::get<0>(attend(inputs, c));
  inputs[5].fill_(NAN);
  inputs[6].fill_(NAN);
  CHECK(std::get<0>(attend(inputs, c)).equal(o));
  const auto without = std::get<0>(sliding_window_attention(
      inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], {}, {}, c.position, {2, 16, kBase}));
  CHECK(without.equal(o));
}

TEST_CASE("attention in pieces is one call, far beyond the window and with rows apart") {
  torch::manual_seed(5);
  const int64_t piece = GENERATE(1, 7, 128, 1000);
  const bool in_place = GENERATE(false, true);
  const int64_t start = GENERATE(0, 10'000'000);
  CAPTURE(piece, in_place, start);
  const at::NoGradGuard no_grad;
  Case c{2, 32, at::tensor({start, start + 5})};
  auto inputs = random_inputs(c, 600, 8, 1);
  inputs[5].zero_();
  inputs[6].zero_();
  const auto [whole, key, value] = attend(inputs, c);
  Tensors parts;
  for (int64_t begin = 0; begin < 600; begin += piece) {
    const auto count = std::min<int64_t>(piece, 600 - begin);
    auto part = inputs;
    for (int i = 0; i < 3; ++i) part[i] = inputs[i].narrow(1, begin, count);
    auto [o, next_key, next_value] = attend(part, c, in_place);
    inputs[5] = next_key;
    inputs[6] = next_value;
    c.position = c.position + count;
    parts.push_back(o);
  }
  CHECK(error_ratio(at::cat(parts, 1), whole) < 1e-5);
  CHECK(error_ratio(inputs[5], key) < 1e-5);
  CHECK(error_ratio(inputs[6], value) < 1e-5);
}

TEST_CASE("rotations are exact at ten million tokens") {
  torch::manual_seed(6);
  const auto x = at::randn({3, 70, 2 * 64});
  const auto position = at::tensor({int64_t{0}, int64_t{10'000'000}, int64_t{100'000'000}});
  const auto expected = plain_rotation(x.to(at::kDouble).view({3, 70, 2, 64}), position).flatten(2);
  CHECK(error_ratio(rotary_embedding(x, position, 2), expected) < 1e-7);
  // Attention sees distances only.
  const Case near{2, 16, at::zeros({1}, at::kLong)};
  const Case far{2, 16, at::full({1}, 10'000'000, at::kLong)};
  auto inputs = random_inputs(near, 40, 64, 1);
  const auto at_start = std::get<0>(attend(inputs, near));
  const auto beyond = std::get<0>(attend(inputs, far));
  // From the 16th token on, neither sees the ring.
  CHECK(error_ratio(beyond.narrow(1, 15, 25), at_start.narrow(1, 15, 25)) < 1e-5);
}

TEST_CASE("the rotation's gradient is the rotation back") {
  torch::manual_seed(7);
  const auto position = at::tensor({int64_t{3}, int64_t{77}});
  const auto errors =
      test::compare([&](const Tensors& in) { return rotary_embedding(in[0], position, 2); },
                    [&](const Tensors& in) {
                      return plain_rotation(in[0].unflatten(2, {2, -1}), position).flatten(2);
                    },
                    {at::randn({2, 9, 24})}, at::kDouble);
  CHECK(errors.output < 1e-12);
  CHECK(errors.gradient < 1e-12);
}

TEST_CASE("results do not depend on the number of threads") {
  torch::manual_seed(8);
  const Case c{2, 32, at::tensor({int64_t{0}, int64_t{9}})};
  const auto inputs = random_inputs(c, 700, 16, 1);
  const auto gradients = [&](int threads) {
    const auto before = at::get_num_threads();
    at::set_num_threads(threads);
    Tensors leaves;
    for (const auto& input : inputs) leaves.push_back(input.clone().requires_grad_());
    std::get<0>(attend(leaves, c)).square().sum().backward();
    at::set_num_threads(before);
    return leaves;
  };
  const auto one = gradients(1);
  const auto two = gradients(2);
  for (size_t i = 0; i < one.size(); ++i) CHECK(one[i].grad().equal(two[i].grad()));
}

TEST_CASE("sliding_window_attention names what does not fit") {
  using Catch::Matchers::ContainsSubstring;
  using Catch::Matchers::MessageMatches;
  const Case c{2, 16, at::zeros({2}, at::kLong)};
  const auto good = random_inputs(c, 5, 8, 1);
  const auto throws_with = [&](size_t index, const Tensor& wrong, const char* text) {
    auto inputs = good;
    inputs[index] = wrong;
    CHECK_THROWS_MATCHES(attend(inputs, c), ShapeError, MessageMatches(ContainsSubstring(text)));
  };
  throws_with(0, at::randn({2, 5, 12}), "the width of query must be a multiple of 4 * heads");
  throws_with(1, at::randn({2, 4, 16}),
              "key must be [B, T, heads * D] = [2, 5, 16], got [2, 4, 16]");
  throws_with(2, good[2].to(at::kDouble), "value must have the type of query");
  throws_with(3, at::randn({2, 1, 8}), "sink_key must be [heads, S, D / 2] = [2, 1, 4]");
  throws_with(4, at::randn({2, 2, 8}), "sink_value must be [heads, S, D] = [2, 1, 8]");
  throws_with(5, at::randn({2, 15, 2, 8}),
              "cache_key must be [B, window, heads, D] = [2, 16, 2, 8]");
  const Case wrong_position{2, 16, at::zeros({3}, at::kLong)};
  CHECK_THROWS_MATCHES(attend(good, wrong_position), ShapeError,
                       MessageMatches(ContainsSubstring("position must be [B] = [2], got [3]")));
  const Case wrong_type{2, 16, at::zeros({2}, at::kInt)};
  CHECK_THROWS_MATCHES(attend(good, wrong_type), ShapeError,
                       MessageMatches(ContainsSubstring("position must be int64")));
}

}  // namespace
}  // namespace fastweights
