// Kimi Delta Attention: the delta rule with a gate for each channel of the key. Per-target include
// guard.
#if defined(FASTWEIGHTS_CORE_KDA_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_KDA_INL_HPP_
#undef FASTWEIGHTS_CORE_KDA_INL_HPP_
#else
#define FASTWEIGHTS_CORE_KDA_INL_HPP_
#endif

#include "fastweights/core/dplr_backward-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// a = α ⊙ k and the written key β k: S ← Diag(α) S + β k (v − Sᵀ(α ⊙ k))ᵀ.
struct Kda {
  static constexpr Correction kCorrection = Correction::kDelta;

  template <class Real>
  static void load(const RuleParams<Real>& params, const Head& head, std::int64_t token,
                   const TokenRows<Real>& x) {
    const std::int64_t keys = params.shape.K;
    load_query_row(params, head, token, x.q);
    load_decay_rows(params, head, token, x);
    load_key_row(params, head, token, x.k);
    multiply_rows(x.decay, x.k, keys, x.a);
    scale_row(x.k, load_gate<Real>(params.beta, head, token), keys, x.k);
  }

  template <class Real>
  static void differentiate(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                            const Head& head, std::int64_t token, const TokenRows<Real>& x,
                            const TokenRows<Real>& d_x, const KeyHeadGradients<Real>& sum) {
    const std::int64_t keys = params.shape.K;
    const Real beta = load_gate<Real>(params.beta, head, token);
    alignas(64) Real k[kMaxHeadSize];
    load_key_row(params, head, token, k);
    store_gate_gradient(gradients.d_beta, head, token, dot(k, d_x.k, keys));
    for (std::int64_t c = 0; c < keys; ++c) {
      sum.k[c] += beta * d_x.k[c] + x.decay[c] * d_x.a[c];
      d_x.log_decay[c] += x.a[c] * d_x.a[c];
    }
    store_log_decay_gradient(params, gradients, head, token, d_x.log_decay);
  }
};

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
