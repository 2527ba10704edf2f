// Linear attention: Hebbian writes, with or without a gate. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_LINEAR_ATTENTION_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_LINEAR_ATTENTION_INL_HPP_
#undef FASTWEIGHTS_CORE_LINEAR_ATTENTION_INL_HPP_
#else
#define FASTWEIGHTS_CORE_LINEAR_ATTENTION_INL_HPP_
#endif

#include "fastweights/core/dplr_backward-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// S ← α S + k vᵀ.
struct LinearAttention {
  static constexpr Correction kCorrection = Correction::kNone;

  template <class Real>
  static void load(const RuleParams<Real>& params, const Head& head, std::int64_t token,
                   const TokenRows<Real>& x) {
    load_query_row(params, head, token, x.q);
    load_decay_rows(params, head, token, x);
    load_key_row(params, head, token, x.k);
  }

  template <class Real>
  static void differentiate(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                            const Head& head, std::int64_t token, const TokenRows<Real>& /*x*/,
                            const TokenRows<Real>& d_x, const KeyHeadGradients<Real>& sum) {
    add_scaled_row(d_x.k, Real{1}, params.shape.K, sum.k);
    store_log_decay_gradient(params, gradients, head, token, d_x.log_decay);
  }
};

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
