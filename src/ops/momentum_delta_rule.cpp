#include "fastweights/ops/momentum_delta_rule.hpp"

#include <torch/library.h>

#include "fastweights/core/cpu.hpp"
#include "rule_operator.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using detail::Layout;

const detail::RuleSpec& spec() {
  static const detail::RuleSpec rule{"momentum_delta_rule",
                                     {{"q", Layout::kKeys},
                                      {"k", Layout::kKeys},
                                      {"v", Layout::kValues},
                                      {"g", Layout::kGates},
                                      {"beta", Layout::kGates},
                                      {"mu", Layout::kGates},
                                      {"eta", Layout::kGates},
                                      {"p", Layout::kKeys, /*optional=*/true}},
                                     /*momentum=*/true,
                                     &cpu::momentum_delta_rule_forms<float>,
                                     &cpu::momentum_delta_rule_forms<double>};
  return rule;
}

}  // namespace

MomentumRuleResult momentum_delta_rule(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& g, const Tensor& beta, const Tensor& mu,
                                       const Tensor& eta, const MomentumRuleOptions& options) {
  static const auto op = detail::operator_of(spec());
  const auto initial = options.initial_state.value_or(MomentumState());
  const auto outputs = detail::call_rule(
      op, {q, k, v, g, beta, mu, eta, options.p}, {initial.state, initial.momentum},
      {options.scale, options.output_final_state, options.cu_seqlens, options.use_qk_l2norm});
  if (!options.output_final_state) return {outputs[0], std::nullopt};
  return {outputs[0], MomentumState{outputs[1], outputs[2]}};
}

Tensor momentum_delta_rule_recurrent_(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& g, const Tensor& beta, const Tensor& mu,
                                      const Tensor& eta, MomentumState& state,
                                      const std::optional<Tensor>& p, std::optional<double> scale,
                                      bool use_qk_l2norm) {
  static const auto op = detail::recurrent_operator_of(spec());
  return detail::call_rule_recurrent(op, {q, k, v, g, beta, mu, eta, p},
                                     {state.state, state.momentum}, scale, use_qk_l2norm);
}

}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  fastweights::detail::register_rule(m, fastweights::spec());
}
