#include <ATen/ATen.h>
#include <fastweights/ops/gated_delta_rule.hpp>
#include <fastweights/version.hpp>

#include <cstdio>

int main() {
  // One write and one read: S = β k vᵀ, so with q = k = e₀, β = 1 and scale 1 the output is v.
  const auto k = at::zeros({1, 1, 1, 4});
  k[0][0][0][0] = 1.0F;
  const auto v = at::randn({1, 1, 1, 3});
  const auto g = at::zeros({1, 1, 1});
  const auto beta = at::ones({1, 1, 1});
  const auto [o, state] =
      fastweights::gated_delta_rule(k, k, v, g, beta, {.scale = 1.0, .output_final_state = true});
  const bool right = at::allclose(o, v) && at::allclose((*state)[0][0][0], v[0][0][0]);
  std::printf("fastweights %s: %s\n", fastweights::kVersion, right ? "right" : "wrong");
  return right ? 0 : 1;
}
