#include "fastweights/ops/rwkv7.hpp"

#include "fastweights/ops/generalized_delta_rule.hpp"

namespace fastweights {

RuleResult rwkv7(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k, const at::Tensor& v,
                 const at::Tensor& a, const at::Tensor& b, const RuleOptions& options) {
  RuleOptions scaled = options;
  scaled.scale = options.scale.value_or(1.0);
  return generalized_delta_rule(r, k, v, a, b, w, scaled);
}

at::Tensor rwkv7_recurrent_(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& a, const at::Tensor& b,
                            at::Tensor& state, std::optional<double> scale, bool use_qk_l2norm) {
  return generalized_delta_rule_recurrent_(r, k, v, a, b, w, state, scale.value_or(1.0),
                                           use_qk_l2norm);
}

}  // namespace fastweights
