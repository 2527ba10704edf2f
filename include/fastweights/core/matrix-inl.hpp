// Small matrix products whose operands lie in cache. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_MATRIX_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_MATRIX_INL_HPP_
#undef FASTWEIGHTS_CORE_MATRIX_INL_HPP_
#else
#define FASTWEIGHTS_CORE_MATRIX_INL_HPP_
#endif

#include <hwy/highway.h>

#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_HAVE_SCALABLE
#error "fastweights::core needs vectors whose size is known when compiling (x86, NEON)"
#endif

/// Vector registers.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

/// Vectors across one panel of columns: two where there are 32 registers, one where there are 16.
inline constexpr int kPanelVectors = kRegisters / 16;

template <class Real>
using Tag = hn::ScalableTag<Real>;

template <class Real>
using Vector = hn::Vec<Tag<Real>>;

/// Columns of one panel.
template <class Real>
inline constexpr std::int64_t kPanel =
    kPanelVectors * static_cast<std::int64_t>(hn::MaxLanes(Tag<Real>()));

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

/// A matrix cut into panels of `kPanel` columns; element (row, column) of panel p lies at
/// `data + p · panel_stride + row · row_stride + column`. Panels are full: callers pad.
template <class Real>
struct Panels {
  Real* data = nullptr;
  std::int64_t panel_stride = 0;
  std::int64_t row_stride = 0;

  Real* at(std::int64_t panel, std::int64_t row) const {
    return data + panel * panel_stride + row * row_stride;
  }
};

/// An ordinary row-major matrix seen as panels; its row stride is a multiple of `kPanel`.
template <class Real>
Panels<Real> row_major(Real* data, std::int64_t row_stride) {
  return {data, kPanel<Real>, row_stride};
}

/// A matrix stored panel after panel.
template <class Real>
Panels<Real> panel_major(Real* data, std::int64_t rows) {
  return {data, rows * kPanel<Real>, kPanel<Real>};
}

/// The left operand of a product: element (row, column) at `data + row · row_stride + column ·
/// column_stride`.
template <class Real>
struct Strided {
  const Real* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 0;
};

// One tile of kRows rows and one panel: out ← keep · out + left · right.
template <int kRows, class Real>
HWY_INLINE void multiply_tile(const Strided<Real>& left, std::int64_t row, std::int64_t inner,
                              const Panels<Real>& right, std::int64_t panel, Real keep,
                              const Panels<Real>& out) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  Vector<Real> sum[kRows][kPanelVectors];
  const auto factor = hn::Set(d, keep);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      sum[i][j] = keep == Real{0}
                      ? hn::Zero(d)
                      : hn::Mul(factor, hn::Load(d, out.at(panel, row + i) + j * kLanes));
    }
  }
  const Real* a = left.data + row * left.row_stride;
  const Real* b = right.at(panel, 0);
  for (std::int64_t r = 0; r < inner; ++r, a += left.column_stride, b += right.row_stride) {
    Vector<Real> column[kPanelVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) column[j] = hn::Load(d, b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto x = hn::Set(d, a[i * left.row_stride]);
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) sum[i][j] = hn::MulAdd(x, column[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      hn::Store(sum[i][j], d, out.at(panel, row + i) + j * kLanes);
    }
  }
}

/// out ← keep · out + left · right; left is [rows, inner], right [inner, panels · kPanel]. A `keep`
/// of zero overwrites, whatever `out` held. `out` overlaps neither operand.
template <class Real>
HWY_NOINLINE void multiply(std::int64_t rows, std::int64_t inner, std::int64_t panels,
                           const Strided<Real>& left, const Panels<Real>& right, Real keep,
                           const Panels<Real>& out) {
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    std::int64_t row = 0;
    for (; row + 8 <= rows; row += 8) multiply_tile<8>(left, row, inner, right, panel, keep, out);
    for (; row + 4 <= rows; row += 4) multiply_tile<4>(left, row, inner, right, panel, keep, out);
    for (; row < rows; ++row) multiply_tile<1>(left, row, inner, right, panel, keep, out);
  }
}

/// Rows and columns of the square blocks that `transpose` moves; its operands are padded to them.
#if HWY_TARGET == HWY_SCALAR
template <class Real>
inline constexpr std::int64_t kTransposeBlock = 1;
#else
template <class Real>
inline constexpr std::int64_t kTransposeBlock = 16 / sizeof(Real);

/// Stores block i of 16 bytes at out + i · stride.
template <class D, class V>
HWY_INLINE void scatter_blocks(D d, V v, hn::TFromD<D>* out, std::int64_t stride) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  if constexpr (kLanes * sizeof(hn::TFromD<D>) == 16) {
    hn::StoreU(v, d, out);
  } else {
    const hn::Half<D> half;
    scatter_blocks(half, hn::LowerHalf(half, v), out, stride);
    constexpr std::int64_t kBlocks = kLanes / 2 / kTransposeBlock<hn::TFromD<D>>;
    scatter_blocks(half, hn::UpperHalf(half, v), out + kBlocks * stride, stride);
  }
}
#endif

/// out[c][r] ← in[r][c] for the columns of one vector of `d` and as many rows as a transposed block
/// has.
#if HWY_TARGET == HWY_SCALAR
template <class D, class Real>
HWY_INLINE void transpose_columns(D /*d*/, const Real* in, std::int64_t /*in_stride*/, Real* out,
                                  std::int64_t /*out_stride*/) {
  *out = *in;
}
#else
template <class D>
HWY_INLINE void transpose_columns(D d, const float* in, std::int64_t in_stride, float* out,
                                  std::int64_t out_stride) {
  const hn::Repartition<double, D> dd;
  const auto r0 = hn::LoadU(d, in);
  const auto r1 = hn::LoadU(d, in + in_stride);
  const auto r2 = hn::LoadU(d, in + 2 * in_stride);
  const auto r3 = hn::LoadU(d, in + 3 * in_stride);
  const auto a = hn::BitCast(dd, hn::InterleaveLower(d, r0, r1));  // 00 10 01 11 of each block
  const auto b = hn::BitCast(dd, hn::InterleaveLower(d, r2, r3));
  const auto e = hn::BitCast(dd, hn::InterleaveUpper(d, r0, r1));  // 02 12 03 13
  const auto f = hn::BitCast(dd, hn::InterleaveUpper(d, r2, r3));
  const std::int64_t block = 4 * out_stride;
  scatter_blocks(d, hn::BitCast(d, hn::InterleaveLower(dd, a, b)), out, block);
  scatter_blocks(d, hn::BitCast(d, hn::InterleaveUpper(dd, a, b)), out + out_stride, block);
  scatter_blocks(d, hn::BitCast(d, hn::InterleaveLower(dd, e, f)), out + 2 * out_stride, block);
  scatter_blocks(d, hn::BitCast(d, hn::InterleaveUpper(dd, e, f)), out + 3 * out_stride, block);
}

template <class D>
HWY_INLINE void transpose_columns(D d, const double* in, std::int64_t in_stride, double* out,
                                  std::int64_t out_stride) {
  const auto r0 = hn::LoadU(d, in);
  const auto r1 = hn::LoadU(d, in + in_stride);
  const std::int64_t block = 2 * out_stride;
  scatter_blocks(d, hn::InterleaveLower(d, r0, r1), out, block);
  scatter_blocks(d, hn::InterleaveUpper(d, r0, r1), out + out_stride, block);
}
#endif

/// out[c][r] ← in[r][c]; rows and columns are rounded up to whole blocks, so both operands carry
/// that much padding.
template <class Real>
void transpose(const Real* in, std::int64_t in_stride, std::int64_t rows, std::int64_t columns,
               Real* out, std::int64_t out_stride) {
  constexpr std::int64_t kBlock = kTransposeBlock<Real>;
  const Tag<Real> d;
  const hn::CappedTag<Real, static_cast<std::size_t>(kBlock)> narrow;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  for (std::int64_t r = 0; r < rows; r += kBlock) {
    const Real* from = in + r * in_stride;
    Real* to = out + r;
    std::int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      transpose_columns(d, from + c, in_stride, to + c * out_stride, out_stride);
    }
    for (; c < columns; c += kBlock) {
      transpose_columns(narrow, from + c, in_stride, to + c * out_stride, out_stride);
    }
  }
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
