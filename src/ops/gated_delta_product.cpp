#include "fastweights/ops/gated_delta_product.hpp"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "fastweights/ops/gated_delta_rule.hpp"
#include "layer_op.hpp"
#include "rule_checks.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kRule = "gated_delta_product";

void check(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
           const Tensor& beta, std::int64_t writes) {
  using namespace detail;
  if (writes < 1) {
    refuse(kRule, fmt::format("num_householder must be at least 1, got {}", writes));
  }
  check_query(kRule, q);
  const auto type = q.scalar_type();
  const auto sizes = q.sym_sizes();
  const c10::SymInt steps = sizes[1] * writes;
  check_shape(kRule, "k", k, "[B, T · num_householder, H, K]",
              {sizes[0], steps, sizes[2], sizes[3]});
  check_type(kRule, "k", k, {type});
  check_value(kRule, k, v);
  check_type(kRule, "v", v, {type});
  const c10::SymInt value_heads = v.sym_size(2);
  check_shape(kRule, "beta", beta, "[B, T · num_householder, HV]", {sizes[0], steps, value_heads});
  check_type(kRule, "beta", beta, {type, at::kFloat});
  if (!g) return;
  check_shape(kRule, "g", *g, "[B, T, HV]", {sizes[0], sizes[1], value_heads});
  check_type(kRule, "g", *g, {type, at::kFloat});
}

/// [B, T, …] → [B, T · writes, …], zero but for step `at` of each token.
Tensor spread(const Tensor& tokens, std::int64_t writes, std::int64_t at) {
  std::vector<Tensor> steps(static_cast<size_t>(writes), at::zeros_like(tokens));
  steps[static_cast<size_t>(at)] = tokens;
  return at::stack(steps, 2).flatten(1, 2);
}

/// The tokens' q and g for a call of the gated delta rule with `writes` steps a token: the state
/// decays at the first and is read after the last.
struct Steps {
  Tensor q;
  Tensor g;
};

Steps steps_of(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
               const Tensor& beta, std::int64_t writes) {
  check(q, k, v, g, beta, writes);
  return {spread(q, writes, writes - 1), g ? spread(*g, writes, 0) : at::zeros_like(beta)};
}

/// The rows of each token's last step.
Tensor last_steps(const Tensor& o, std::int64_t writes) {
  return o.unflatten_symint(1, {o.sym_size(1) / writes, writes}).select(2, writes - 1);
}

// Composites: gradients, shapes and batching are those of the operators that they call.

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const OptionalTensor& g, const Tensor& beta,
                                   std::int64_t num_householder, std::optional<double> scale,
                                   const OptionalTensor& initial_state, bool output_final_state,
                                   const OptionalTensor& cu_seqlens, bool use_qk_l2norm) {
  const Steps steps = steps_of(q, k, v, g, beta, num_householder);
  if (cu_seqlens) detail::check_packing(kRule, q, *cu_seqlens);
  if (initial_state) {
    detail::check_state(kRule, "initial_state", *initial_state, q, v,
                        cu_seqlens.value_or(Tensor()));
  }
  RuleOptions options{scale, initial_state, output_final_state, std::nullopt, use_qk_l2norm};
  if (cu_seqlens) options.cu_seqlens = *cu_seqlens * num_householder;
  const auto result = gated_delta_rule(steps.q, k, v, steps.g, beta, options);
  return {last_steps(result.o, num_householder),
          result.final_state ? *result.final_state : at::empty({0}, v.options())};
}

Tensor recurrent(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                 const Tensor& beta, Tensor& state, std::int64_t num_householder,
                 std::optional<double> scale, bool use_qk_l2norm) {
  const Steps steps = steps_of(q, k, v, g, beta, num_householder);
  detail::check_state(kRule, "state", state, q, v, {});
  return last_steps(
      gated_delta_rule_recurrent_(steps.q, k, v, steps.g, beta, state, scale, use_qk_l2norm),
      num_householder);
}

}  // namespace

RuleResult gated_delta_product(const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& g, const Tensor& beta,
                               std::int64_t num_householder, const RuleOptions& options) {
  static const auto op =
      detail::find_operator<decltype(forward)>("fastweights::gated_delta_product");
  auto [o, state] = op.call(q, k, v, g, beta, num_householder, options.scale, options.initial_state,
                            options.output_final_state, options.cu_seqlens, options.use_qk_l2norm);
  return {o, options.output_final_state ? OptionalTensor(state) : std::nullopt};
}

Tensor gated_delta_product_recurrent_(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const OptionalTensor& g, const Tensor& beta, Tensor& state,
                                      std::int64_t num_householder, std::optional<double> scale,
                                      bool use_qk_l2norm) {
  static const auto op =
      detail::find_operator<decltype(recurrent)>("fastweights::gated_delta_product_recurrent_");
  return op.call(q, k, v, g, beta, state, num_householder, scale, use_qk_l2norm);
}

}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "gated_delta_product(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, int "
      "num_householder, float? scale=None, Tensor? initial_state=None, bool "
      "output_final_state=False, Tensor? cu_seqlens=None, bool use_qk_l2norm=False) -> (Tensor o, "
      "Tensor final_state)",
      fastweights::forward);
  m.def(
      "gated_delta_product_recurrent_(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, "
      "Tensor(a!) state, int num_householder, float? scale=None, bool use_qk_l2norm=False) -> "
      "Tensor",
      fastweights::recurrent);
}
