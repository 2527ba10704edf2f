#include "training/adamw.hpp"

#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <limits>

#include "fastweights/core/error.hpp"

using training::AdamW;
using training::AdamWOptions;

namespace {

at::Tensor parameter(std::vector<int64_t> shape) {
  return torch::randn(shape).requires_grad_(true);
}

void set_gradient(at::Tensor& tensor) { tensor.mutable_grad() = torch::randn_like(tensor); }

}  // namespace

TEST_CASE("weight decay is for the matrices of projections only", "[adamw]") {
  const at::Tensor matrix = torch::zeros({4, 4});
  const at::Tensor vector = torch::zeros({4});
  CHECK(AdamW::decays("blocks.0.memory.query.weight", matrix));
  CHECK(AdamW::decays("output.weight", matrix));
  CHECK_FALSE(AdamW::decays("embedding.weight", matrix));
  CHECK_FALSE(AdamW::decays("blocks.0.memory.convolution_weight", matrix));
  CHECK_FALSE(AdamW::decays("blocks.0.mixer_norm.weight", vector));
  CHECK_FALSE(AdamW::decays("blocks.0.memory.dt_bias", vector));
}

TEST_CASE("the fused update is that of torch::optim::AdamW", "[adamw]") {
  torch::manual_seed(0);
  at::Tensor ours = parameter({7, 9});
  at::Tensor theirs = ours.detach().clone().requires_grad_(true);
  AdamW optimizer({{"layer.weight", ours}}, {.weight_decay = 0.1, .clip = 0.5});
  torch::optim::AdamW reference(
      {theirs}, torch::optim::AdamWOptions(0.01).betas({0.9, 0.95}).weight_decay(0.1));
  for (int i = 0; i < 20; ++i) {
    set_gradient(ours);
    theirs.mutable_grad() = ours.grad().clone();
    const double norm = torch::nn::utils::clip_grad_norm_({theirs}, 0.5);
    CHECK(std::abs(optimizer.step(0.01) - norm) < 1e-5);
    reference.step();
  }
  CHECK(torch::allclose(ours, theirs, 1e-5, 1e-6));
  CHECK(ours.grad().count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("a gradient that is not finite changes nothing", "[adamw]") {
  at::Tensor weight = parameter({3, 3});
  AdamW optimizer({{"layer.weight", weight}}, {});
  const at::Tensor before = weight.detach().clone();
  weight.mutable_grad() = torch::full({3, 3}, std::numeric_limits<float>::quiet_NaN());
  CHECK_FALSE(std::isfinite(optimizer.step(0.1)));
  CHECK(weight.equal(before));
}

TEST_CASE("a restored optimizer goes on exactly", "[adamw]") {
  torch::manual_seed(1);
  at::Tensor a = parameter({5, 5});
  AdamW first({{"layer.weight", a}}, {});
  for (int i = 0; i < 3; ++i) {
    set_gradient(a);
    first.step(0.01);
  }
  at::Tensor b = a.detach().clone().requires_grad_(true);
  AdamW second({{"layer.weight", b}}, {});
  second.restore(first.save());
  set_gradient(a);
  b.mutable_grad() = a.grad().clone();
  first.step(0.01);
  second.step(0.01);
  CHECK(a.equal(b));

  AdamW other({{"other.weight", b}}, {});
  CHECK_THROWS_AS(other.restore(first.save()), fastweights::StateMismatch);
}
