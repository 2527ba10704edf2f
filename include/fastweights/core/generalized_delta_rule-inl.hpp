// The generalized delta rule: diagonal plus low rank, as RWKV-7 has it. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_GENERALIZED_DELTA_RULE_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_GENERALIZED_DELTA_RULE_INL_HPP_
#undef FASTWEIGHTS_CORE_GENERALIZED_DELTA_RULE_INL_HPP_
#else
#define FASTWEIGHTS_CORE_GENERALIZED_DELTA_RULE_INL_HPP_
#endif

#include "fastweights/core/dplr_backward-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// S ← Diag(α) S + b (Sᵀa)ᵀ + k vᵀ, the rows as they are given.
struct GeneralizedDeltaRule {
  static constexpr Correction kCorrection = Correction::kGeneral;

  template <class Real>
  static void load(const RuleParams<Real>& params, const Head& head, std::int64_t token,
                   const TokenRows<Real>& x) {
    const std::int64_t keys = params.shape.K;
    const std::int64_t batch = head.sequence.batch;
    load_query_row(params, head, token, x.q);
    load_decay_rows(params, head, token, x);
    load_key_row(params, head, token, x.k);
    load_row<Real>(params.a.at(batch, token, head.key_head), params.a.dtype, keys, x.a);
    load_row<Real>(params.b.at(batch, token, head.key_head), params.b.dtype, keys, x.b);
  }

  template <class Real>
  static void differentiate(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                            const Head& head, std::int64_t token, const TokenRows<Real>& /*x*/,
                            const TokenRows<Real>& d_x, const KeyHeadGradients<Real>& sum) {
    const std::int64_t keys = params.shape.K;
    add_scaled_row(d_x.k, Real{1}, keys, sum.k);
    add_scaled_row(d_x.a, Real{1}, keys, sum.a);
    add_scaled_row(d_x.b, Real{1}, keys, sum.b);
    store_log_decay_gradient(params, gradients, head, token, d_x.log_decay);
  }
};

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
