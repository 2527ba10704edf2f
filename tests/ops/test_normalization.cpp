#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "fastweights/core/error.hpp"
#include "fastweights/ops/normalization.hpp"
#include "numerics.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using test::compare;
using test::Tensors;
using test::tolerance;

constexpr double kEps = 1e-6;

Tensor plain_norm(const Tensor& x, const Tensor& weight) {
  return x * (x.square().mean(-1, true) + kEps).rsqrt() * weight;
}

TEST_CASE("rms_norm, gated_rms_norm and swiglu are their formulas, with gradients") {
  torch::manual_seed(1);
  const auto type = GENERATE(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf);
  const int64_t width = GENERATE(1, 7, 60, 64, 256, 700);
  const int64_t rows = GENERATE(0, 1, 3, 500);
  CAPTURE(type, width, rows);
  const auto x = at::randn({rows, 2, width});
  const auto gate = at::randn({rows, 2, width}) * 3;
  const auto weight = at::randn({width});
  const auto limit = tolerance(type);

  const auto norm =
      compare([](const Tensors& in) { return rms_norm(in[0], in[1], kEps); },
              [](const Tensors& in) { return plain_norm(in[0], in[1]); }, {x, weight}, type);
  CHECK(norm.output < limit.output);
  // The gradient of a normalised single element is a difference of two equal numbers.
  if (width > 1) CHECK(norm.gradient < limit.gradient);

  const auto gated =
      compare([](const Tensors& in) { return gated_rms_norm(in[0], in[1], in[2], kEps); },
              [](const Tensors& in) { return plain_norm(in[0], in[2]) * at::silu(in[1]); },
              {x, gate, weight}, type);
  CHECK(gated.output < limit.output);
  if (width > 1) CHECK(gated.gradient < limit.gradient);

  const auto unit =
      compare([](const Tensors& in) { return swiglu(in[0], in[1]); },
              [](const Tensors& in) { return at::silu(in[0]) * in[1]; }, {gate, x}, type);
  CHECK(unit.output < limit.output);
  CHECK(unit.gradient < limit.gradient);
}

TEST_CASE("norms of mixed types and of strided inputs") {
  torch::manual_seed(2);
  const auto x = at::randn({4, 64, 5}).transpose(1, 2);
  const auto weight = at::randn({64});
  CHECK(test::error_ratio(rms_norm(x, weight.to(at::kBFloat16), kEps),
                          plain_norm(x, weight.to(at::kBFloat16).to(at::kFloat))) < 1e-6);
  const auto y = rms_norm(x, weight, kEps, at::kBFloat16);
  CHECK(y.scalar_type() == at::kBFloat16);
  CHECK(test::error_ratio(y, plain_norm(x, weight)) < 5e-3);
  const auto gated = gated_rms_norm(x, at::ones_like(x).to(at::kBFloat16), weight, kEps);
  CHECK(gated.scalar_type() == at::kFloat);
}

TEST_CASE("gates of any size give finite results") {
  const auto gate = at::tensor({-1e4F, -100.0F, -88.0F, 0.0F, 88.0F, 100.0F, 1e4F});
  const auto given = gate.clone().requires_grad_();
  const auto y = swiglu(given, at::ones_like(gate));
  y.sum().backward();
  CHECK(y.isfinite().all().item<bool>());
  CHECK(given.grad().isfinite().all().item<bool>());
  CHECK(test::error_ratio(y, at::silu(gate.to(at::kDouble))) < 1e-6);
  CHECK(swiglu(gate * NAN, gate).isnan().all().item<bool>());
}

TEST_CASE("rms_norm returns autocast's type under autocast") {
  const auto x = at::randn({2, 3, 8});
  const auto weight = at::ones({8});
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto lower = rms_norm(x, weight, kEps).scalar_type();
  const auto chosen = rms_norm(x, weight, kEps, at::kFloat).scalar_type();
  const auto wide = rms_norm(x.to(at::kDouble), weight, kEps).scalar_type();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  CHECK(lower == at::kBFloat16);
  CHECK(chosen == at::kFloat);
  CHECK(wide == at::kDouble);
}

TEST_CASE("the sum of the weight's gradient does not depend on the number of threads") {
  torch::manual_seed(3);
  const auto x = at::randn({3000, 64});
  const auto outer = at::randn({3000, 64});
  const auto gradient = [&](int threads) {
    const auto before = at::get_num_threads();
    at::set_num_threads(threads);
    const auto weight = at::ones({64}).requires_grad_();
    rms_norm(x, weight, kEps).backward(outer);
    at::set_num_threads(before);
    return weight.grad();
  };
  CHECK(gradient(1).equal(gradient(2)));
}

TEST_CASE("norms name what does not fit") {
  using Catch::Matchers::Message;
  const auto x = at::randn({2, 3, 8});
  CHECK_THROWS_MATCHES(rms_norm(x, at::ones({7}), kEps), ShapeError,
                       Message("rms_norm: weight must be [D] = [8], got [7]"));
  CHECK_THROWS_MATCHES(
      gated_rms_norm(x, at::randn({2, 3, 7}), at::ones({8}), kEps), ShapeError,
      Message("gated_rms_norm: gate must be the shape of x = [2, 3, 8], got [2, 3, 7]"));
  CHECK_THROWS_MATCHES(swiglu(x, at::randn({2, 3})), ShapeError,
                       Message("swiglu: up must be the shape of gate = [2, 3, 8], got [2, 3]"));
  CHECK_THROWS_MATCHES(swiglu(x, at::ones({2, 3, 8}, at::kLong)), ShapeError,
                       Message("swiglu: up must be of a floating-point type, got Long"));
}

}  // namespace
}  // namespace fastweights
