// Activations and padded rows for the kernels of the layers. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_ACTIVATION_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_ACTIVATION_INL_HPP_
#undef FASTWEIGHTS_CORE_ACTIVATION_INL_HPP_
#else
#define FASTWEIGHTS_CORE_ACTIVATION_INL_HPP_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fastweights/core/array.hpp"
#include "fastweights/core/rows-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

template <class Real>
constexpr DType real_dtype() {
  return std::is_same_v<Real, double> ? DType::kFloat64 : DType::kFloat32;
}

/// Elements of a row in a buffer whose rows are whole vectors.
template <class Real>
std::int64_t padded(std::int64_t size) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(hn::ScalableTag<Real>()));
  return (size + lanes - 1) / lanes * lanes;
}

/// The row as `Real`, with whole vectors to read: itself if it is that already, else a copy in
/// `scratch`, padded with zeros.
template <class Real>
const Real* read_row(const void* row, DType dtype, std::int64_t size, Real* scratch) {
  const auto full = padded<Real>(size);
  if (dtype == real_dtype<Real>() && full == size) return static_cast<const Real*>(row);
  load_row(row, dtype, size, scratch);
  std::fill(scratch + size, scratch + full, Real{0});
  return scratch;
}

/// Where to put a row of `Real` with whole vectors to write: the row itself if it can take them,
/// else `scratch`, which `finish_row` then stores.
template <class Real>
Real* begin_row(void* row, DType dtype, std::int64_t size, Real* scratch) {
  const bool direct = dtype == real_dtype<Real>() && padded<Real>(size) == size;
  return direct ? static_cast<Real*>(row) : scratch;
}

template <class Real>
void finish_row(const Real* from, std::int64_t size, void* row, DType dtype) {
  if (from != row) store_row(from, size, row, dtype);
}

/// 1 / x for x in [1, 2^126]. In fp32 an estimate and a Newton step, half an ulp worse than a
/// division, take a third of its time.
template <class D, class V>
HWY_INLINE V reciprocal(D d, V x) {
  using Real = hn::TFromD<D>;
  if constexpr (std::is_same_v<Real, float> && HWY_TARGET != HWY_SCALAR) {
    const auto estimate = hn::ApproximateReciprocal(x);
    return hn::Mul(estimate, hn::NegMulAdd(x, estimate, hn::Set(d, Real{2})));
  } else {
    return hn::Div(hn::Set(d, Real{1}), x);
  }
}

/// 1 / (1 + exp(−x)), without overflow.
template <class D, class V>
HWY_INLINE V sigmoid(D d, V x) {
  using Real = hn::TFromD<D>;
  const auto limit = hn::Set(d, std::is_same_v<Real, double> ? Real(700) : Real(87));
  const auto one = hn::Set(d, Real{1});
  return reciprocal(d, hn::Add(one, hn::Exp(d, hn::Min(hn::Neg(x), limit))));
}

/// The derivative of silu(x) = x · s, where s = sigmoid(x).
template <class D, class V>
HWY_INLINE V silu_slope(D d, V x, V s) {
  const auto one = hn::Set(d, hn::TFromD<D>{1});
  return hn::Mul(s, hn::MulAdd(x, hn::Sub(one, s), one));
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
