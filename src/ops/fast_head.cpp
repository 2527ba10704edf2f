#include "fastweights/ops/fast_head.hpp"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#include "compute_type.hpp"
#include "fastweights/ops/softmax_delta_rule.hpp"
#include "layer_checks.hpp"

namespace fastweights {
namespace {

using at::Tensor;

constexpr std::string_view kOp = "fast_head";
/// Up to here a strength is stable, with room to spare: a softmax moves by half a logit at most.
constexpr double kLargestEta = 2.0;

void check(const Tensor& h, const Tensor& logits, const Tensor& tokens, const Tensor& hidden,
           const Tensor& pending, const Tensor& strength) {
  detail::check_dim(kOp, "h", h, "[B, T, D]", 3);
  detail::check_dim(kOp, "logits", logits, "[B, T, N]", 3);
  const auto batch = h.sym_size(0);
  const auto count = h.sym_size(1);
  detail::check_shape(kOp, "tokens", tokens, "[B, T]", {batch, count});
  detail::check_shape(kOp, "hidden", hidden, "[B, D]", {batch, h.sym_size(2)});
  detail::check_shape(kOp, "pending", pending, "[B, N]", {batch, logits.sym_size(2)});
  if (strength.defined()) detail::check_shape(kOp, "strength", strength, "[B, T]", {batch, count});
}

/// A number for every token that may be written: the pending one and all that are new. The last has
/// no target, so that its number does not matter.
Tensor per_token(double value, const Tensor& h) {
  return at::full_symint({h.sym_size(0), h.sym_size(1) + 1}, value,
                         h.options().dtype(detail::compute_type(h)));
}

Tensor aligned(const Tensor& strength, const Tensor& like) {
  return at::cat(
      {strength.to(like.scalar_type()), at::ones_symint({strength.sym_size(0), 1}, like.options())},
      1);
}

struct Strengths {
  Tensor eta, g;
};

Strengths strengths_of(const FastHeadParams& params, const Tensor& h) {
  Strengths s{per_token(params.eta, h), params.g == 0.0 ? Tensor() : per_token(params.g, h)};
  if (!params.strength.defined()) return s;
  const auto r = aligned(params.strength, s.eta);
  s.eta = s.eta * r;
  if (params.limited.defined()) params.limited.add_(s.eta.gt(kLargestEta).sum());
  s.eta = s.eta.clamp_max(kLargestEta);
  if (s.g.defined()) s.g = s.g * r.clamp_max(1.0);
  return s;
}

/// `value`, in the place of `old` if that is wanted; never a view of something larger.
Tensor put(const Tensor& value, const Tensor& old, bool in_place) {
  return in_place ? old.copy_(value) : value.clone();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> fast_head(const Tensor& h, const Tensor& logits,
                                                     const Tensor& tokens, const Tensor& state,
                                                     const Tensor& hidden, const Tensor& pending,
                                                     const FastHeadParams& params) {
  check(h, logits, tokens, hidden, pending, params.strength);
  const auto count = tokens.sym_size(1);
  if (count == 0) return {logits, state, hidden, pending};
  const auto keys = at::cat({hidden.unsqueeze(1), h.to(hidden.scalar_type())}, 1);
  const auto all = at::cat({pending.unsqueeze(1), logits.to(pending.scalar_type())}, 1);
  const auto target =
      at::cat({tokens, at::full_symint({tokens.sym_size(0), 1}, -1, tokens.options())}, 1);
  const auto [eta, g] = strengths_of(params, keys.narrow_symint(1, 0, count));
  SoftmaxDeltaRuleOptions options;
  if (g.defined()) options.g = g;
  Tensor corrected;
  Tensor next = state;
  if (params.in_place) {
    corrected = softmax_delta_rule_recurrent_(keys, all, target, eta, options.g, next, true);
  } else {
    options.initial_state = state;
    options.output_final_state = options.pending = true;
    auto [y, final_state] = softmax_delta_rule(keys, all, target, eta, options);
    corrected = y;
    next = *final_state;
  }
  return {corrected.narrow_symint(1, 1, count), next,
          put(keys.select_symint(1, count), hidden, params.in_place),
          put(corrected.select_symint(1, count), pending, params.in_place)};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> fast_head_op(const Tensor& h, const Tensor& logits,
                                                        const Tensor& tokens, const Tensor& state,
                                                        const Tensor& hidden, const Tensor& pending,
                                                        double eta, double g,
                                                        const std::optional<Tensor>& strength,
                                                        bool in_place) {
  return fast_head(h, logits, tokens, state, hidden, pending,
                   {eta, g, in_place, strength.value_or(Tensor()), {}});
}

}  // namespace
}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "fast_head(Tensor h, Tensor logits, Tensor tokens, Tensor state, Tensor hidden, "
      "Tensor pending, float eta, float g, Tensor? strength=None, bool in_place=False) "
      "-> (Tensor logits, Tensor state, Tensor hidden, Tensor pending)",
      &fastweights::fast_head_op);
}
