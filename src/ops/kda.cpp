#include "fastweights/ops/kda.hpp"

#include <torch/library.h>

#include "fastweights/core/cpu.hpp"
#include "rule_operator.hpp"

namespace fastweights {
namespace {

using detail::Layout;

const detail::RuleSpec& spec() {
  static const detail::RuleSpec rule{"kda",
                                     {{"q", Layout::kKeys},
                                      {"k", Layout::kKeys},
                                      {"v", Layout::kValues},
                                      {"g", Layout::kChannelGates},
                                      {"beta", Layout::kGates}},
                                     /*momentum=*/false,
                                     &cpu::kda_forms<float>,
                                     &cpu::kda_forms<double>};
  return rule;
}

}  // namespace

RuleResult kda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
               const at::Tensor& beta, const RuleOptions& options) {
  static const auto op = detail::operator_of(spec());
  return detail::call_rule(op, {q, k, v, g, beta}, options);
}

at::Tensor kda_recurrent_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                          std::optional<double> scale, bool use_qk_l2norm) {
  static const auto op = detail::recurrent_operator_of(spec());
  return detail::call_rule_recurrent(op, {q, k, v, g, beta}, {state}, scale, use_qk_l2norm);
}

}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  fastweights::detail::register_rule(m, fastweights::spec());
}
