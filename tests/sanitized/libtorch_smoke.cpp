/// \file
/// The operators under AddressSanitizer and UBSan, through LibTorch: the dispatcher, the checks,
/// the layouts, autograd. The sanitized build has no LibTorch otherwise; what the kernels compute
/// is tested elsewhere, here every tensor is a heap block of its own whose ends are watched.
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/ops/delta_rule.hpp"
#include "fastweights/ops/gated_delta_product.hpp"
#include "fastweights/ops/gated_delta_rule.hpp"
#include "fastweights/ops/kda.hpp"

namespace fastweights {
namespace {

using at::Tensor;

void require(bool condition, const char* promise) {
  if (condition) return;
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::exit(1);
}

/// Tensors of one call; every second element of a longer row, so that rows are copied.
struct Inputs {
  Inputs(at::ScalarType type, int64_t tokens)
      : q(at::randn({2, tokens, 2, 66}, type).slice(3, 0, 66, 2)),
        k(at::randn({2, tokens, 2, 33}, type) * 0.1),
        v(at::randn({tokens, 2, 4, 17}, type).transpose(0, 1)),
        beta(at::rand({2, tokens, 4}, type)),
        g(at::rand({2, tokens, 4}, type).neg()),
        state(at::randn({2, 4, 33, 17}, type == at::kDouble ? at::kDouble : at::kFloat)) {
    for (Tensor* tensor : {&q, &k, &v, &beta, &g, &state}) tensor->requires_grad_();
  }
  std::vector<Tensor> all() const { return {q, k, v, beta, g, state}; }

  Tensor q, k, v, beta, g, state;
};

void check_gradients(const RuleResult& result, const Inputs& x) {
  const Tensor loss = result.o.to(at::kDouble).square().sum() + result.final_state->sum();
  const auto gradients = torch::autograd::grad({loss}, x.all(), {}, std::nullopt, false, true);
  require(at::isfinite(result.o).all().item<bool>(), "outputs are finite");
  for (const Tensor& gradient : gradients) {
    if (!gradient.defined()) continue;
    require(at::isfinite(gradient).all().item<bool>(), "gradients are finite");
  }
}

void run(at::ScalarType type, int64_t tokens) {
  const Inputs x(type, tokens);
  RuleOptions options;
  options.initial_state = x.state;
  options.output_final_state = true;
  check_gradients(delta_rule(x.q, x.k, x.v, x.beta, options), x);
  check_gradients(gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, options), x);
  const Tensor channels = x.g.unsqueeze(-1).expand({2, tokens, 4, 33});
  check_gradients(kda(x.q, x.k, x.v, channels, x.beta, options), x);
  if (tokens % 2 == 0) {
    const auto halved = [](const Tensor& tensor) { return tensor.slice(1, 0, tensor.size(1) / 2); };
    check_gradients(gated_delta_product(halved(x.q), x.k, x.v, halved(x.g), x.beta, 2, options), x);
  }

  Tensor wide = at::randn({2, 4, 33, 20}, x.state.options().requires_grad(false));
  Tensor working = wide.slice(3, 0, 17);
  const at::NoGradGuard no_gradients;
  const Tensor o = gated_delta_rule_recurrent_(x.q, x.k, x.v, x.g, x.beta, working);
  require(at::isfinite(o).all().item<bool>(), "the recurrent form's outputs are finite");

  RuleOptions packed;
  packed.cu_seqlens = at::tensor({int64_t{0}, int64_t{0}, tokens}, at::kLong);
  const auto first = [](const Tensor& tensor) { return tensor.slice(0, 0, 1); };
  delta_rule(first(x.q), first(x.k), first(x.v), first(x.beta), packed);
  try {
    delta_rule(x.q, x.k, x.v, x.beta.slice(2, 1), options);
    require(false, "a wrong shape is refused");
  } catch (const ShapeError&) {
  }
}

}  // namespace
}  // namespace fastweights

int main() {
  torch::manual_seed(0);
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    for (const int64_t tokens : {0, 1, 9, 70}) fastweights::run(type, tokens);
  }
  std::puts("no broken promise");
  return 0;
}
