#include "fastweights/ops/linear_attention.hpp"

#include <torch/library.h>

#include "fastweights/core/cpu.hpp"
#include "rule_operator.hpp"

namespace fastweights {
namespace {

using detail::Layout;

const detail::RuleSpec& spec() {
  static const detail::RuleSpec rule{"linear_attention",
                                     {{"q", Layout::kKeys},
                                      {"k", Layout::kKeys},
                                      {"v", Layout::kValues},
                                      {"g", Layout::kGates, /*optional=*/true}},
                                     /*momentum=*/false,
                                     &cpu::linear_attention_forms<float>,
                                     &cpu::linear_attention_forms<double>};
  return rule;
}

}  // namespace

RuleResult linear_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& g, const RuleOptions& options) {
  static const auto op = detail::operator_of(spec());
  return detail::call_rule(op, {q, k, v, g}, options);
}

at::Tensor linear_attention_recurrent_(const at::Tensor& q, const at::Tensor& k,
                                       const at::Tensor& v, const std::optional<at::Tensor>& g,
                                       at::Tensor& state, std::optional<double> scale,
                                       bool use_qk_l2norm) {
  static const auto op = detail::recurrent_operator_of(spec());
  return detail::call_rule_recurrent(op, {q, k, v, g}, {state}, scale, use_qk_l2norm);
}

}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  fastweights::detail::register_rule(m, fastweights::spec());
}
