#include "fastweights/ops/gated_delta_product.hpp"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/ops/gated_delta_rule.hpp"

namespace fastweights {
namespace {

using at::Tensor;

/// The tokens' q and g for a call of the gated delta rule with `writes` steps a token: the state
/// decays at the first and is read after the last.
struct Steps {
  Tensor q;
  Tensor g;
};

/// [B, T, …] → [B, T · writes, …], zero but for step `at` of each token.
Tensor spread(const Tensor& tokens, std::int64_t writes, std::int64_t at) {
  std::vector<Tensor> steps(static_cast<size_t>(writes), at::zeros_like(tokens));
  steps[static_cast<size_t>(at)] = tokens;
  return at::stack(steps, 2).flatten(1, 2);
}

void check_steps(const char* name, const Tensor& tensor, const Tensor& q, std::int64_t writes) {
  if (tensor.dim() >= 2 && tensor.sym_size(1) == q.sym_size(1) * writes) return;
  throw ShapeError(
      fmt::format("gated_delta_product: {} must have T · num_householder = {} · {} rows, got {}",
                  name, q.size(1), writes, tensor.dim() >= 2 ? tensor.size(1) : 0));
}

Steps steps_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& g,
               const Tensor& beta, std::int64_t writes) {
  if (writes < 1) {
    throw ShapeError(
        fmt::format("gated_delta_product: num_householder must be at least 1, got {}", writes));
  }
  if (q.dim() != 4) throw ShapeError("gated_delta_product: q must be [B, T, H, K]");
  check_steps("k", k, q, writes);
  check_steps("v", v, q, writes);
  check_steps("beta", beta, q, writes);
  if (g && (g->dim() != 3 || g->sym_size(1) != q.sym_size(1))) {
    throw ShapeError("gated_delta_product: g must be [B, T, HV], with the T of q");
  }
  return {spread(q, writes, writes - 1), g ? spread(*g, writes, 0) : at::zeros_like(beta)};
}

/// The rows of each token's last step.
Tensor last_steps(const Tensor& o, std::int64_t writes) {
  return o.unflatten(1, {o.size(1) / writes, writes}).select(2, writes - 1);
}

}  // namespace

RuleResult gated_delta_product(const Tensor& q, const Tensor& k, const Tensor& v,
                               const std::optional<Tensor>& g, const Tensor& beta,
                               std::int64_t num_householder, const RuleOptions& options) {
  const Steps steps = steps_of(q, k, v, g, beta, num_householder);
  RuleOptions of_steps = options;
  if (options.cu_seqlens) of_steps.cu_seqlens = *options.cu_seqlens * num_householder;
  auto result = gated_delta_rule(steps.q, k, v, steps.g, beta, of_steps);
  result.o = last_steps(result.o, num_householder);
  return result;
}

Tensor gated_delta_product_recurrent_(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const std::optional<Tensor>& g, const Tensor& beta,
                                      Tensor& state, std::int64_t num_householder,
                                      std::optional<double> scale, bool use_qk_l2norm) {
  const Steps steps = steps_of(q, k, v, g, beta, num_householder);
  return last_steps(
      gated_delta_rule_recurrent_(steps.q, k, v, steps.g, beta, state, scale, use_qk_l2norm),
      num_householder);
}

}  // namespace fastweights
