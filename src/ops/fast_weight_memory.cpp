#include "fastweights/ops/fast_weight_memory.hpp"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <string>

#include "compute_type.hpp"
#include "fastweights/ops/delta_rule.hpp"
#include "fastweights/ops/gated_delta_rule.hpp"
#include "fastweights/ops/normalization.hpp"
#include "fastweights/ops/short_convolution.hpp"
#include "layer_checks.hpp"

namespace fastweights {
namespace {

constexpr std::string_view kOp = "fast_weight_memory";

// The recurrent form is the faster one up to about this many tokens.
constexpr int64_t kRecurrentTokens = 8;

// The largest β whose write is stable for a key of norm one.
constexpr double kStableBeta = 2.0;

using OptionalTensor = std::optional<at::Tensor>;

// What the rule reads: q, k [B, T, H, K], v [B, T, HV, V].
struct Heads {
  at::Tensor q, k, v, convolution_state;
};

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
           const at::Tensor& beta, const at::Tensor& gate, const FastWeightMemoryParams& params) {
  detail::check_that(
      params.heads > 0 && params.value_heads > 0 && params.value_heads % params.heads == 0, kOp,
      "value_heads must be a positive multiple of heads");
  detail::check_dim(kOp, "query", query, "[B, T, H * K]", 3);
  detail::check_dim(kOp, "value", value, "[B, T, HV * V]", 3);
  const auto batch = query.sym_size(0);
  const auto tokens = query.sym_size(1);
  const auto heads = params.value_heads;
  detail::check_that(query.sym_size(2) % params.heads == 0, kOp,
                     "the width of query must be a multiple of heads");
  detail::check_that(value.sym_size(2) % heads == 0, kOp,
                     "the width of value must be a multiple of value_heads");
  detail::check_shape(kOp, "key", key, "[B, T, H * K]", query.sym_sizes());
  detail::check_shape(kOp, "value", value, "[B, T, HV * V]", {batch, tokens, value.sym_size(2)});
  detail::check_shape(kOp, "gate", gate, "[B, T, HV * V]", value.sym_sizes());
  detail::check_shape(kOp, "beta", beta, "[B, T, HV]", {batch, tokens, heads});
}

at::Tensor split_heads(const at::Tensor& x, int64_t heads) {
  return x.unflatten_symint(-1, {heads, x.sym_size(-1) / heads});
}

// One pass of the convolution over each of the three, without joining them first.
Heads convolve(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
               const at::Tensor& weight, const at::Tensor& state,
               const FastWeightMemoryParams& params) {
  const auto keys = query.sym_size(2);
  const auto values = value.sym_size(2);
  const auto part = [&](const at::Tensor& x, const c10::SymInt& begin, const c10::SymInt& size) {
    return short_convolution(x, weight.narrow_symint(0, begin, size),
                             state.narrow_symint(2, begin, size));
  };
  const auto [q, q_state] = part(query, 0, keys);
  const auto [k, k_state] = part(key, keys, keys);
  const auto [v, v_state] = part(value, keys * 2, values);
  return {split_heads(q, params.heads), split_heads(k, params.heads),
          split_heads(v, params.value_heads), at::cat({q_state, k_state, v_state}, 2)};
}

at::Tensor zeros_unless_given(const OptionalTensor& given, c10::SymIntArrayRef shape,
                              const at::Tensor& like) {
  if (given.has_value()) return *given;
  return at::zeros_symint(shape, like.options().dtype(detail::compute_type(like)));
}

at::Tensor log_decay(const at::Tensor& decay, const at::Tensor& a_log, const at::Tensor& dt_bias,
                     at::ScalarType compute) {
  const auto step = at::softplus(decay.to(compute) + dt_bias.to(compute));
  return step * a_log.to(compute).exp().neg();
}

const at::Tensor& required(const OptionalTensor& tensor, std::string_view name) {
  detail::check_that(tensor.has_value() && tensor->defined(), kOp,
                     std::string(name) + " is needed by the rule \"gated_delta_rule\"");
  return *tensor;
}

at::Tensor gates(const OptionalTensor& decay, const OptionalTensor& a_log,
                 const OptionalTensor& dt_bias, const at::Tensor& beta) {
  const auto heads = beta.sym_size(2);
  detail::check_shape(kOp, "decay", required(decay, "decay"), "[B, T, HV]", beta.sym_sizes());
  detail::check_shape(kOp, "a_log", required(a_log, "a_log"), "[HV]", {heads});
  detail::check_shape(kOp, "dt_bias", required(dt_bias, "dt_bias"), "[HV]", {heads});
  return log_decay(*decay, *a_log, *dt_bias, detail::compute_type(beta));
}

// β [B, T, HV] times the strengths [B, T, 1], within the stable range.
at::Tensor strengthened(const at::Tensor& beta, const at::Tensor& strength, at::Tensor limited) {
  const auto wanted = beta * strength;
  if (limited.defined()) limited.add_((wanted > kStableBeta).sum());
  return wanted.clamp_max(kStableBeta);
}

// g [B, T, HV] times min(strength, 1). A gate of −∞ forgets whatever the strength is, but for 0.
at::Tensor weakened(const at::Tensor& g, const at::Tensor& strength) {
  const auto forgets = g.isinf();
  const auto product = g.masked_fill(forgets, 0) * strength.clamp_max(1.0);
  return product.masked_fill(forgets.logical_and(strength != 0),
                             -std::numeric_limits<double>::infinity());
}

// Runs the rule; `g` is undefined for the rule without a decay. Returns o [B, T, HV, V] and the
// state.
std::tuple<at::Tensor, at::Tensor> write_and_read(const Heads& x, const at::Tensor& g,
                                                  const at::Tensor& beta, at::Tensor state,
                                                  bool in_place) {
  if (in_place && x.q.sym_size(1) <= kRecurrentTokens) {
    auto o = g.defined()
                 ? gated_delta_rule_recurrent_(x.q, x.k, x.v, g, beta, state, std::nullopt, true)
                 : delta_rule_recurrent_(x.q, x.k, x.v, beta, state, std::nullopt, true);
    return {o, state};
  }
  RuleOptions options;
  options.initial_state = state;
  options.output_final_state = true;
  options.use_qk_l2norm = true;
  auto [o, final_state] = g.defined() ? gated_delta_rule(x.q, x.k, x.v, g, beta, options)
                                      : delta_rule(x.q, x.k, x.v, beta, options);
  return {o, *final_state};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> fast_weight_memory(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& beta,
    const OptionalTensor& decay, const at::Tensor& gate, const at::Tensor& convolution_weight,
    const OptionalTensor& a_log, const OptionalTensor& dt_bias, const at::Tensor& norm_weight,
    const OptionalTensor& state, const OptionalTensor& convolution_state,
    const FastWeightMemoryParams& params, const WriteStrength& write, const MemoryRule& rule) {
  check(query, key, value, beta, gate, params);
  const bool gated = params.rule == "gated_delta_rule";
  detail::check_that(gated || params.rule == "delta_rule", kOp,
                     "rule must be \"gated_delta_rule\" or \"delta_rule\", got \"" +
                         std::string(params.rule) + "\"");
  const auto batch = query.sym_size(0);
  const auto channels = query.sym_size(2) * 2 + value.sym_size(2);
  detail::check_dim(kOp, "convolution_weight", convolution_weight, "[2 * H * K + HV * V, W]", 2);
  const auto taps = convolution_weight.sym_size(1);
  detail::check_shape(kOp, "convolution_weight", convolution_weight, "[2 * H * K + HV * V, W]",
                      {channels, taps});
  const std::vector<c10::SymInt> convolution_shape{batch, taps - 1, channels};
  const std::vector<c10::SymInt> state_shape{batch, params.value_heads,
                                             query.sym_size(2) / params.heads,
                                             value.sym_size(2) / params.value_heads};
  const auto compute = detail::compute_type(query);
  const auto past = zeros_unless_given(convolution_state, convolution_shape, query);
  const auto memory = zeros_unless_given(state, state_shape, query);
  detail::check_shape(kOp, "conv", past, "[B, W - 1, 2 * H * K + HV * V]", convolution_shape);
  detail::check_shape(kOp, "state", memory, "[B, HV, K, V]", state_shape);
  detail::check_that(memory.scalar_type() == compute, kOp,
                     std::string("state must be ") + c10::toString(compute) + ", got " +
                         c10::toString(memory.scalar_type()));

  const auto heads = convolve(query, key, value, convolution_weight, past, params);
  auto rate = at::sigmoid(beta.to(compute)) * params.beta_max;
  auto g = gated ? gates(decay, a_log, dt_bias, beta) : at::Tensor();
  if (write.strength.defined()) {
    detail::check_shape(kOp, "write_strength", write.strength, "[B, T]",
                        {batch, query.sym_size(1)});
    const auto strength = write.strength.to(compute).unsqueeze(-1);
    rate = strengthened(rate, strength, write.limited);
    if (gated) g = weakened(g, strength);
  }
  const auto [o, next] = rule ? rule({heads.q, heads.k, heads.v, g, rate, memory})
                              : write_and_read(heads, g, rate, memory, params.in_place);
  const auto y = gated_rms_norm(o.to(heads.v.scalar_type()), split_heads(gate, params.value_heads),
                                norm_weight, params.eps);
  return {y.flatten(-2), next, heads.convolution_state};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> fast_weight_memory_op(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& beta,
    const OptionalTensor& decay, const at::Tensor& gate, const at::Tensor& convolution_weight,
    const OptionalTensor& a_log, const OptionalTensor& dt_bias, const at::Tensor& norm_weight,
    const OptionalTensor& state, const OptionalTensor& conv, int64_t heads, int64_t value_heads,
    double beta_max, c10::string_view rule, double eps, bool in_place,
    const OptionalTensor& write_strength) {
  return fast_weight_memory(
      query, key, value, beta, decay, gate, convolution_weight, a_log, dt_bias, norm_weight, state,
      conv, {heads, value_heads, beta_max, {rule.data(), rule.size()}, eps, in_place},
      {write_strength.value_or(at::Tensor()), {}});
}

}  // namespace
}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "fast_weight_memory(Tensor query, Tensor key, Tensor value, Tensor beta, Tensor? decay, "
      "Tensor gate, Tensor convolution_weight, Tensor? a_log, Tensor? dt_bias, "
      "Tensor norm_weight, Tensor? state, Tensor? conv, int heads, int value_heads, "
      "float beta_max, str rule, float eps, bool in_place=False, Tensor? write_strength=None) "
      "-> (Tensor o, Tensor state, Tensor conv)",
      &fastweights::fast_weight_memory_op);
}
