// Rows in any element type, read into and written from the type of the arithmetic.
// Per-target include guard: this file is compiled once per instruction set.
#if defined(FASTWEIGHTS_CORE_ROWS_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_ROWS_INL_HPP_
#undef FASTWEIGHTS_CORE_ROWS_INL_HPP_
#else
#define FASTWEIGHTS_CORE_ROWS_INL_HPP_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <Eigen/Core>
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "fastweights/core/view.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline float widen(std::uint16_t bits, DType dtype) {
  return dtype == DType::kBFloat16
             ? std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16)
             : Eigen::half_impl::half_to_float(Eigen::half_impl::raw_uint16_to_half(bits));
}

/// Round to nearest, ties to even; NaN stays NaN.
inline std::uint16_t narrow_to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline std::uint16_t narrow_to_float16(float value) {
  return Eigen::half_impl::float_to_half_rtne(value).x;
}

/// Copies `size` elements of type `dtype` to `out`.
template <class Real>
void load_row(const void* row, DType dtype, std::int64_t size, Real* HWY_RESTRICT out) {
  switch (dtype) {
    case DType::kFloat64: {
      const auto* in = static_cast<const double*>(row);
      for (std::int64_t i = 0; i < size; ++i) out[i] = static_cast<Real>(in[i]);
      return;
    }
    case DType::kFloat32: {
      const auto* in = static_cast<const float*>(row);
      for (std::int64_t i = 0; i < size; ++i) out[i] = static_cast<Real>(in[i]);
      return;
    }
    case DType::kBFloat16: {
      const auto* in = static_cast<const std::uint16_t*>(row);
      for (std::int64_t i = 0; i < size; ++i) {
        out[i] = std::bit_cast<float>(static_cast<std::uint32_t>(in[i]) << 16);
      }
      return;
    }
    case DType::kFloat16: {
      const auto* in = static_cast<const std::uint16_t*>(row);
      std::int64_t i = 0;
      if constexpr (std::is_same_v<Real, float>) {
        const hn::ScalableTag<float> d;
        const hn::Rebind<hwy::float16_t, decltype(d)> d16;
        const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
        for (; i + lanes <= size; i += lanes) {
          const auto* half = reinterpret_cast<const hwy::float16_t*>(in + i);
          hn::StoreU(hn::PromoteTo(d, hn::LoadU(d16, half)), d, out + i);
        }
      }
      for (; i < size; ++i) out[i] = widen(in[i], dtype);
      return;
    }
  }
}

/// Writes `size` elements as type `dtype`, rounded to nearest even.
template <class Real>
void store_row(const Real* HWY_RESTRICT in, std::int64_t size, void* row, DType dtype) {
  switch (dtype) {
    case DType::kFloat64: {
      auto* out = static_cast<double*>(row);
      for (std::int64_t i = 0; i < size; ++i) out[i] = static_cast<double>(in[i]);
      return;
    }
    case DType::kFloat32: {
      auto* out = static_cast<float*>(row);
      for (std::int64_t i = 0; i < size; ++i) out[i] = static_cast<float>(in[i]);
      return;
    }
    case DType::kBFloat16: {
      auto* out = static_cast<std::uint16_t*>(row);
      for (std::int64_t i = 0; i < size; ++i) {
        out[i] = narrow_to_bfloat16(static_cast<float>(in[i]));
      }
      return;
    }
    case DType::kFloat16: {
      auto* out = static_cast<std::uint16_t*>(row);
      for (std::int64_t i = 0; i < size; ++i) {
        out[i] = narrow_to_float16(static_cast<float>(in[i]));
      }
      return;
    }
  }
}

/// A vector of a state, which lies in `Real` or in bf16.
template <class D>
HWY_INLINE hn::Vec<D> load_stored(D d, const hn::TFromD<D>* state) {
  return hn::LoadU(d, state);
}

template <class D>
HWY_INLINE hn::Vec<D> load_stored(D d, const std::uint16_t* state) {
  const hn::Rebind<std::uint16_t, D> narrow;
  const hn::Rebind<std::uint32_t, D> wide;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(wide, hn::LoadU(narrow, state))));
}

template <class D>
HWY_INLINE void store_stored(hn::Vec<D> row, D d, hn::TFromD<D>* state) {
  hn::StoreU(row, d, state);
}

/// Rounds as `narrow_to_bfloat16` does.
template <class D>
HWY_INLINE void store_stored(hn::Vec<D> row, D d, std::uint16_t* state) {
  const hn::Rebind<std::uint16_t, D> narrow;
  const hn::Rebind<std::uint32_t, D> wide;
  const hn::Rebind<std::int32_t, D> whole;
  const auto bits = hn::BitCast(wide, row);
  const auto cut = hn::ShiftRight<16>(bits);
  const auto odd = hn::And(cut, hn::Set(wide, 1u));
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(wide, 0x7fffu)), odd));
  const auto is_number = hn::RebindMask(wide, hn::Eq(row, row));
  const auto result = hn::IfThenElse(is_number, rounded, hn::Or(cut, hn::Set(wide, 0x40u)));
  hn::StoreU(hn::DemoteTo(narrow, hn::BitCast(whole, result)), narrow, state);
}

template <class Real>
Real load_scalar(const void* element, DType dtype) {
  Real value{};
  load_row<Real>(element, dtype, 1, &value);
  return value;
}

template <class Real>
Real dot(const Real* HWY_RESTRICT a, const Real* HWY_RESTRICT b, std::int64_t size) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<decltype(d)> sums[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) sums[j] = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + 4 * lanes <= size; i += 4 * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sums[j] =
          hn::MulAdd(hn::LoadU(d, a + i + j * lanes), hn::LoadU(d, b + i + j * lanes), sums[j]);
    }
  }
  for (; i + lanes <= size; i += lanes) {
    sums[0] = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sums[0]);
  }
  const auto sum = hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3]));
  Real total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < size; ++i) total += a[i] * b[i];
  return total;
}

/// out ← factor · in (in may be out).
template <class Real>
void scale_row(const Real* in, Real factor, std::int64_t size, Real* out) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto f = hn::Set(d, factor);
  std::int64_t i = 0;
  for (; i + lanes <= size; i += lanes) hn::StoreU(hn::Mul(f, hn::LoadU(d, in + i)), d, out + i);
  for (; i < size; ++i) out[i] = factor * in[i];
}

/// out ← out + factor · in.
template <class Real>
void add_scaled_row(const Real* HWY_RESTRICT in, Real factor, std::int64_t size,
                    Real* HWY_RESTRICT out) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto f = hn::Set(d, factor);
  std::int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    hn::StoreU(hn::MulAdd(f, hn::LoadU(d, in + i), hn::LoadU(d, out + i)), d, out + i);
  }
  for (; i < size; ++i) out[i] += factor * in[i];
}

/// out[i] ← the sum over the lanes of sums[i]; `count` is a multiple of 16 bytes' worth of sums.
#if HWY_TARGET == HWY_SCALAR
template <class D>
HWY_INLINE void sum_each(D /*d*/, const hn::Vec<D>* sums, int count, hn::TFromD<D>* out) {
  for (int i = 0; i < count; ++i) out[i] = hn::GetLane(sums[i]);
}
#else
/// Sums of the lanes of two (double) or four (float) vectors in each block of 16 bytes.
HWY_INLINE hn::Vec<hn::ScalableTag<double>> sum_blocks(hn::ScalableTag<double> d,
                                                       const hn::Vec<hn::ScalableTag<double>>* v) {
  return hn::Add(hn::InterleaveLower(d, v[0], v[1]), hn::InterleaveUpper(d, v[0], v[1]));
}

HWY_INLINE hn::Vec<hn::ScalableTag<float>> sum_blocks(hn::ScalableTag<float> d,
                                                      const hn::Vec<hn::ScalableTag<float>>* v) {
  const hn::Repartition<double, decltype(d)> dd;
  const auto add = [&](auto a, auto b) HWY_ATTR {
    return hn::BitCast(dd, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  };
  const auto ab = add(v[0], v[1]);
  const auto cd = add(v[2], v[3]);
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(dd, ab, cd)),
                 hn::BitCast(d, hn::InterleaveUpper(dd, ab, cd)));
}

template <class D>
HWY_INLINE void sum_each(D d, const hn::Vec<D>* sums, int count, hn::TFromD<D>* out) {
  using Real = hn::TFromD<D>;
  constexpr int kGroup = 16 / sizeof(Real);
  constexpr int kBlocks = static_cast<int>(hn::MaxLanes(d)) / kGroup;
  const hn::FixedTag<Real, kGroup> block;
  alignas(64) Real parts[hn::MaxLanes(d)];
  for (int i = 0; i < count; i += kGroup) {
    hn::Store(sum_blocks(d, sums + i), d, parts);
    auto total = hn::Load(block, parts);
    for (int b = 1; b < kBlocks; ++b) total = hn::Add(total, hn::Load(block, parts + b * kGroup));
    hn::StoreU(total, block, out + i);
  }
}
#endif

/// out ← exp(in) (out may be in). −∞ becomes an exact zero, NaN stays NaN.
template <class Real>
void exp_row(const Real* in, std::int64_t size, Real* out) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    const auto x = hn::LoadU(d, in + i);
    hn::StoreU(hn::IfThenElse(hn::Eq(x, x), hn::Exp(d, x), x), d, out + i);
  }
  for (; i < size; ++i) out[i] = std::exp(in[i]);
}

/// 1 / ‖row‖ as `use_qk_l2norm` has it: rsqrt(Σx² + 1e-6).
template <class Real>
Real inverse_norm(const Real* row, std::int64_t size) {
  return Real{1} / std::sqrt(dot(row, row, size) + static_cast<Real>(1e-6));
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
