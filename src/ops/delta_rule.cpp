#include "fastweights/ops/delta_rule.hpp"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "layer_op.hpp"
#include "rule_call.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using detail::find_operator;
using detail::RuleCall;
using detail::RuleEntries;
using detail::RuleGradients;
using detail::RuleOutputs;
using OptionalTensor = std::optional<Tensor>;

RuleCall make_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                   std::optional<double> scale, const OptionalTensor& initial_state,
                   bool output_final_state, const OptionalTensor& cu_seqlens, bool use_qk_l2norm) {
  return {"delta_rule",
          q,
          k,
          v,
          std::nullopt,
          beta,
          scale,
          initial_state,
          output_final_state,
          cu_seqlens,
          use_qk_l2norm};
}

using ForwardSignature = RuleOutputs(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     std::optional<double>, const OptionalTensor&, bool,
                                     const OptionalTensor&, bool);
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardSignature = BackwardResult(const OptionalTensor&, const OptionalTensor&,
                                         const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         std::optional<double>, const OptionalTensor&,
                                         const OptionalTensor&, bool);
using RecurrentSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                  Tensor&, std::optional<double>, bool);

RuleOutputs call_forward(const RuleCall& c) {
  static const auto op = find_operator<ForwardSignature>("fastweights::delta_rule");
  return op.call(c.q, c.k, c.v, c.beta, c.scale, c.initial_state, c.output_final_state,
                 c.cu_seqlens, c.use_qk_l2norm);
}

RuleGradients call_backward(const RuleCall& c, const OptionalTensor& d_o,
                            const OptionalTensor& d_final_state) {
  static const auto op = find_operator<BackwardSignature>("fastweights::delta_rule_backward");
  auto [d_q, d_k, d_v, d_beta, d_state] =
      op.call(d_o, d_final_state, c.q, c.k, c.v, c.beta, c.scale, c.initial_state, c.cu_seqlens,
              c.use_qk_l2norm);
  return {d_q, d_k, d_v, Tensor(), d_beta, c.initial_state ? d_state : Tensor()};
}

constexpr RuleEntries kEntries{call_forward, call_backward};

template <RuleOutputs (*kRule)(const RuleCall&)>
RuleOutputs forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                    std::optional<double> scale, const OptionalTensor& initial_state,
                    bool output_final_state, const OptionalTensor& cu_seqlens, bool use_qk_l2norm) {
  return kRule(make_call(q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens,
                         use_qk_l2norm));
}

RuleOutputs autograd(const RuleCall& call) { return detail::rule_autograd(call, kEntries); }
RuleOutputs autocast(const RuleCall& call) { return detail::rule_autocast(call, kEntries); }

BackwardResult without_gate(const RuleGradients& d) {
  return {d.q, d.k, d.v, d.beta, d.initial_state};
}

BackwardResult backward_cpu(const OptionalTensor& d_o, const OptionalTensor& d_final_state,
                            const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                            std::optional<double> scale, const OptionalTensor& initial_state,
                            const OptionalTensor& cu_seqlens, bool use_qk_l2norm) {
  return without_gate(detail::rule_backward_cpu(
      make_call(q, k, v, beta, scale, initial_state, false, cu_seqlens, use_qk_l2norm), d_o,
      d_final_state));
}

BackwardResult backward_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor& beta,
                             std::optional<double> scale, const OptionalTensor& initial_state,
                             const OptionalTensor& cu_seqlens, bool use_qk_l2norm) {
  return without_gate(detail::rule_backward_meta(
      make_call(q, k, v, beta, scale, initial_state, false, cu_seqlens, use_qk_l2norm)));
}

RuleCall recurrent_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                        std::optional<double> scale, bool use_qk_l2norm) {
  return make_call(q, k, v, beta, scale, std::nullopt, true, std::nullopt, use_qk_l2norm);
}

Tensor recurrent_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                     Tensor& state, std::optional<double> scale, bool use_qk_l2norm) {
  return detail::rule_recurrent_cpu(recurrent_call(q, k, v, beta, scale, use_qk_l2norm), state);
}

Tensor recurrent_meta(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                      Tensor&, std::optional<double> scale, bool use_qk_l2norm) {
  return std::get<0>(detail::rule_meta(recurrent_call(q, k, v, beta, scale, use_qk_l2norm)));
}

}  // namespace

RuleResult delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                      const RuleOptions& options) {
  auto [o, final_state] = call_forward(make_call(q, k, v, beta, options.scale,
                                                 options.initial_state, options.output_final_state,
                                                 options.cu_seqlens, options.use_qk_l2norm));
  return {o, options.output_final_state ? OptionalTensor(final_state) : std::nullopt};
}

Tensor delta_rule_recurrent_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                             Tensor& state, std::optional<double> scale, bool use_qk_l2norm) {
  static const auto op = find_operator<RecurrentSignature>("fastweights::delta_rule_recurrent_");
  return op.call(q, k, v, beta, state, scale, use_qk_l2norm);
}

}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, float? scale=None, "
      "Tensor? initial_state=None, bool output_final_state=False, Tensor? cu_seqlens=None, "
      "bool use_qk_l2norm=False) -> (Tensor o, Tensor final_state)");
  m.def(
      "delta_rule_backward(Tensor? d_o, Tensor? d_final_state, Tensor q, Tensor k, Tensor v, "
      "Tensor beta, float? scale, Tensor? initial_state, Tensor? cu_seqlens, bool use_qk_l2norm) "
      "-> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_beta, Tensor d_initial_state)");
  m.def(
      "delta_rule_recurrent_(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor(a!) state, "
      "float? scale=None, bool use_qk_l2norm=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("delta_rule", fastweights::forward<fastweights::detail::rule_cpu>);
  m.impl("delta_rule_backward", fastweights::backward_cpu);
  m.impl("delta_rule_recurrent_", fastweights::recurrent_cpu);
}

TORCH_LIBRARY_IMPL(fastweights, Meta, m) {
  m.impl("delta_rule", fastweights::forward<fastweights::detail::rule_meta>);
  m.impl("delta_rule_backward", fastweights::backward_meta);
  m.impl("delta_rule_recurrent_", fastweights::recurrent_meta);
}

TORCH_LIBRARY_IMPL(fastweights, Autograd, m) {
  m.impl("delta_rule", fastweights::forward<fastweights::autograd>);
  m.impl("delta_rule_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("delta_rule_recurrent_", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(fastweights, ADInplaceOrView, m) {
  m.impl("delta_rule_recurrent_", torch::autograd::autogradNotImplementedInplaceOrViewFallback());
}

TORCH_LIBRARY_IMPL(fastweights, AutocastCPU, m) {
  m.impl("delta_rule", fastweights::forward<fastweights::autocast>);
}

TORCH_LIBRARY_IMPL(fastweights, AutocastCUDA, m) {
  m.impl("delta_rule", fastweights::forward<fastweights::autocast>);
}
