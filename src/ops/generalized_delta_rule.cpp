#include "fastweights/ops/generalized_delta_rule.hpp"

#include <torch/library.h>

#include "fastweights/core/cpu.hpp"
#include "rule_operator.hpp"

namespace fastweights {
namespace {

using detail::Layout;

const detail::RuleSpec& spec() {
  static const detail::RuleSpec rule{"generalized_delta_rule",
                                     {{"q", Layout::kKeys},
                                      {"k", Layout::kKeys},
                                      {"v", Layout::kValues},
                                      {"a", Layout::kKeys},
                                      {"b", Layout::kKeys},
                                      {"g", Layout::kChannelGates}},
                                     /*momentum=*/false,
                                     &cpu::generalized_delta_rule_forms<float>,
                                     &cpu::generalized_delta_rule_forms<double>};
  return rule;
}

}  // namespace

RuleResult generalized_delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const at::Tensor& a, const at::Tensor& b, const at::Tensor& g,
                                  const RuleOptions& options) {
  static const auto op = detail::operator_of(spec());
  return detail::call_rule(op, {q, k, v, a, b, g}, options);
}

at::Tensor generalized_delta_rule_recurrent_(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& a,
                                             const at::Tensor& b, const at::Tensor& g,
                                             at::Tensor& state, std::optional<double> scale,
                                             bool use_qk_l2norm) {
  static const auto op = detail::recurrent_operator_of(spec());
  return detail::call_rule_recurrent(op, {q, k, v, a, b, g}, {state}, scale, use_qk_l2norm);
}

}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  fastweights::detail::register_rule(m, fastweights::spec());
}
