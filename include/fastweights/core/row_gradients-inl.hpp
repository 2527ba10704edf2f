// Gradients of single rows, back through the normalisation and into the call's tensors.
// Per-target include guard.
#if defined(FASTWEIGHTS_CORE_ROW_GRADIENTS_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_ROW_GRADIENTS_INL_HPP_
#undef FASTWEIGHTS_CORE_ROW_GRADIENTS_INL_HPP_
#else
#define FASTWEIGHTS_CORE_ROW_GRADIENTS_INL_HPP_
#endif

#include <cstdint>

#include "fastweights/core/panel_walk-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// Where the gradients of a key head's rows are summed over the value heads that read it.
template <class Real>
struct KeyHeadGradients {
  Real* q;
  Real* k;
  Real* a;
  Real* b;
};

/// Gradient of x from that of x · rsqrt(Σx² + 1e-6), in place; without the normalisation unchanged.
template <class Real>
void differentiate_norm(const RuleParams<Real>& params, const ConstView& view, const Head& head,
                        std::int64_t token, Real* gradient) {
  if (!params.use_qk_l2norm) return;
  const std::int64_t keys = params.shape.K;
  alignas(64) Real x[kMaxHeadSize];
  load_row<Real>(view.at(head.sequence.batch, token, head.key_head), view.dtype, keys, x);
  const Real norm = inverse_norm(x, keys);
  const Real along = norm * norm * dot(x, gradient, keys);
  for (std::int64_t c = 0; c < keys; ++c) gradient[c] = norm * (gradient[c] - along * x[c]);
}

template <class Real>
void store_key_gradient(const View& view, const Head& head, std::int64_t token, std::int64_t keys,
                        const Real* gradient) {
  if (!view) return;
  store_row(gradient, keys, view.at(head.sequence.batch, token, head.key_head), view.dtype);
}

template <class Real>
void store_gate_gradient(const View& view, const Head& head, std::int64_t token, Real gradient) {
  if (!view) return;
  store_row(&gradient, 1, view.at(head.sequence.batch, token, head.value_head), view.dtype);
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
