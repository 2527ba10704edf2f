#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "fastweights/core/error.hpp"
#include "fastweights/ops/short_convolution.hpp"
#include "numerics.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using test::error_ratio;
using test::Tensors;

Tensor plain_convolution(const Tensor& x, const Tensor& weight, const Tensor& state) {
  const auto inputs = at::cat({state, x}, 1);
  auto sum = at::zeros_like(x);
  for (int64_t tap = 0; tap < weight.size(1); ++tap) {
    sum = sum + inputs.narrow(1, tap, x.size(1)) * weight.select(1, tap);
  }
  return at::silu(sum);
}

TEST_CASE("short_convolution is its formula, with gradients") {
  torch::manual_seed(1);
  const auto type = GENERATE(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf);
  const int64_t taps = GENERATE(1, 2, 4, 40);
  const int64_t tokens = GENERATE(0, 1, 3, 31, 32, 33, 64, 65, 67, 150);
  const int64_t channels = GENERATE(1, 100, 600);
  CAPTURE(type, taps, tokens, channels);
  const auto errors = test::compare(
      [](const Tensors& in) { return std::get<0>(short_convolution(in[0], in[1], in[2])); },
      [](const Tensors& in) { return plain_convolution(in[0], in[1], in[2]); },
      {at::randn({2, tokens, channels}), at::randn({channels, taps}),
       at::randn({2, taps - 1, channels})},
      type);
  CHECK(errors.output < test::tolerance(type).output);
  CHECK(errors.gradient < test::tolerance(type).gradient);
}

TEST_CASE("the convolution's state is the last inputs, in a tensor of its own") {
  torch::manual_seed(2);
  const auto state = at::randn({2, 3, 8});
  const auto weight = at::randn({8, 4});
  const int64_t tokens = GENERATE(0, 1, 2, 3, 10);
  const auto x = at::randn({2, tokens, 8});
  const auto next = std::get<1>(short_convolution(x, weight, state));
  CHECK(next.equal(at::cat({state, x}, 1).narrow(1, tokens, 3)));
  CHECK(next.storage().nbytes() == 2UL * 3 * 8 * sizeof(float));
  // Its type is that of the state given, else that of x.
  const auto half = x.to(at::kBFloat16);
  CHECK(std::get<1>(short_convolution(half, weight, state)).scalar_type() == at::kFloat);
  CHECK(std::get<1>(short_convolution(half, weight)).scalar_type() == at::kBFloat16);
}

TEST_CASE("gradients flow through the convolution's state") {
  torch::manual_seed(3);
  const auto x = at::randn({1, 9, 8}, at::kDouble);
  const auto weight = at::randn({8, 4}, at::kDouble);
  const auto whole = x.clone().requires_grad_();
  std::get<0>(short_convolution(whole, weight)).square().sum().backward();
  const auto cut = x.clone().requires_grad_();
  auto [first, state] = short_convolution(cut.narrow(1, 0, 2), weight);
  auto [second, unused] = short_convolution(cut.narrow(1, 2, 7), weight, state);
  (first.square().sum() + second.square().sum()).backward();
  CHECK(error_ratio(cut.grad(), whole.grad()) < 1e-12);
}

TEST_CASE("short_convolution in pieces is one call") {
  torch::manual_seed(4);
  const int64_t piece = GENERATE(1, 2, 7, 128, 1000);
  const auto x = at::randn({2, 1100, 70});
  const auto weight = at::randn({70, 4});
  const auto [whole, last] = short_convolution(x, weight);
  Tensors parts;
  auto state = at::zeros({2, 3, 70});
  for (int64_t begin = 0; begin < x.size(1); begin += piece) {
    auto [y, next] =
        short_convolution(x.narrow(1, begin, std::min(piece, x.size(1) - begin)), weight, state);
    parts.push_back(y);
    state = next;
  }
  CHECK(error_ratio(at::cat(parts, 1), whole) < 1e-6);
  CHECK(state.equal(last));
}

TEST_CASE("short_convolution names what does not fit") {
  using Catch::Matchers::Message;
  const auto x = at::randn({2, 5, 8});
  const auto weight = at::randn({8, 4});
  CHECK_THROWS_MATCHES(short_convolution(x.select(0, 0), weight), ShapeError,
                       Message("short_convolution: x must be [B, T, D], got [5, 8]"));
  CHECK_THROWS_MATCHES(short_convolution(x, at::randn({7, 4})), ShapeError,
                       Message("short_convolution: weight must be [D, W] = [8, 4], got [7, 4]"));
  CHECK_THROWS_MATCHES(
      short_convolution(x, weight, at::randn({2, 4, 8})), ShapeError,
      Message("short_convolution: initial_state must be [B, W - 1, D] = [2, 3, 8], got [2, 4, 8]"));
  CHECK_THROWS_MATCHES(short_convolution(x, at::randn({8, 0})), ShapeError,
                       Message("short_convolution: weight must have at least one tap"));
}

}  // namespace
}  // namespace fastweights
