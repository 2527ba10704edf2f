// The softmax delta rule, chunkwise and exact: docs/softmax_delta_rule.md has the formulas.
// Per-target include guard.
#if defined(FASTWEIGHTS_CORE_SOFTMAX_DELTA_RULE_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_SOFTMAX_DELTA_RULE_INL_HPP_
#undef FASTWEIGHTS_CORE_SOFTMAX_DELTA_RULE_INL_HPP_
#else
#define FASTWEIGHTS_CORE_SOFTMAX_DELTA_RULE_INL_HPP_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/matrix-inl.hpp"
#include "fastweights/core/rows-inl.hpp"
#include "fastweights/core/softmax_delta_rule.hpp"
#include "fastweights/core/team.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace softmax_delta {

namespace hn = hwy::HWY_NAMESPACE;

/// Tokens that read the state as it is before the first of them, in one product.
inline constexpr int kTokens = 16;
/// Columns of a state that one task takes.
inline constexpr std::int64_t kColumns = 128;
/// Rows of a state that one task takes where columns are summed.
inline constexpr std::int64_t kRows = 64;

// ---- products ----------------------------------------------------------------------------------

/// out ← base + shrink · base + left · right. Element (r, i) of `left` lies at left + r · left_row
/// + i · left_inner; the other matrices are row-major. `out` may be `base`; both may be null-sized.
template <class Real>
struct Product {
  std::int64_t rows = 0;
  std::int64_t inner = 0;
  const Real* left = nullptr;
  std::int64_t left_row = 0;
  std::int64_t left_inner = 0;
  const Real* right = nullptr;
  std::int64_t right_stride = 0;
  const Real* base = nullptr;  // null for zeros
  std::int64_t base_stride = 0;
  Real shrink = Real{0};  // a decay minus one, which keeps its digits where it is near one
  Real* out = nullptr;
  std::int64_t out_stride = 0;
};

/// A tile of kCount rows and kVectors vectors of columns.
template <int kCount, int kVectors, class D, class Real>
HWY_INLINE void multiply_tile(D d, const Product<Real>& p, std::int64_t row, std::int64_t column) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  hn::Vec<D> sum[kCount][kVectors];
  const auto shrink = hn::Set(d, p.shrink);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      if (p.base == nullptr) {
        sum[i][j] = hn::Zero(d);
        continue;
      }
      const auto base = hn::LoadU(d, p.base + (row + i) * p.base_stride + column + j * kLanes);
      sum[i][j] = p.shrink == Real{0} ? base : hn::MulAdd(shrink, base, base);
    }
  }
  const Real* left = p.left + row * p.left_row;
  const Real* right = p.right + column;
  for (std::int64_t r = 0; r < p.inner; ++r, left += p.left_inner, right += p.right_stride) {
    hn::Vec<D> vector[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) vector[j] = hn::LoadU(d, right + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const auto x = hn::Set(d, left[i * p.left_row]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(x, vector[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      hn::StoreU(sum[i][j], d, p.out + (row + i) * p.out_stride + column + j * kLanes);
    }
  }
}

/// kCount rows, the columns [begin, end): as wide as the registers allow.
template <int kCount, class Real>
HWY_INLINE void multiply_rows(const Product<Real>& p, std::int64_t row, std::int64_t begin,
                              std::int64_t end) {
  constexpr int kVectors = std::min(8, kRegisters / 2 / kCount);
  const hn::ScalableTag<Real> d;
  const hn::CappedTag<Real, 1> one;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  auto column = begin;
  for (; column + kVectors * kLanes <= end; column += kVectors * kLanes) {
    multiply_tile<kCount, kVectors>(d, p, row, column);
  }
  for (; column + kLanes <= end; column += kLanes) multiply_tile<kCount, 1>(d, p, row, column);
  for (; column < end; ++column) multiply_tile<kCount, 1>(one, p, row, column);
}

/// The columns [begin, end) of a product. Every element is summed in the order of `inner`, wherever
/// the columns are cut.
template <class Real>
HWY_NOINLINE void multiply(const Product<Real>& p, std::int64_t begin, std::int64_t end) {
  constexpr int kBulk = kRegisters / 4;
  std::int64_t row = 0;
  for (; row + kBulk <= p.rows; row += kBulk) multiply_rows<kBulk>(p, row, begin, end);
  for (; row + 2 <= p.rows; row += 2) multiply_rows<2>(p, row, begin, end);
  for (; row < p.rows; ++row) multiply_rows<1>(p, row, begin, end);
}

/// Dot products of kLeft rows with four rows.
template <int kLeft, class Real>
HWY_INLINE void dot_tile(const Real* left, std::int64_t left_stride, const Real* right,
                         std::int64_t right_stride, std::int64_t size, Real* out,
                         std::int64_t out_stride) {
  const hn::ScalableTag<Real> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  hn::Vec<decltype(d)> sum[kLeft][4];
#pragma GCC unroll 4
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = hn::Zero(d);
  }
  std::int64_t c = 0;
  for (; c + kLanes <= size; c += kLanes) {
    hn::Vec<decltype(d)> vector[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) vector[j] = hn::LoadU(d, right + j * right_stride + c);
#pragma GCC unroll 4
    for (int i = 0; i < kLeft; ++i) {
      const auto x = hn::LoadU(d, left + i * left_stride + c);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = hn::MulAdd(x, vector[j], sum[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLeft; ++i) {
    alignas(16) Real total[4];
    sum_each(d, sum[i], 4, total);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      for (auto rest = c; rest < size; ++rest) {
        total[j] += left[i * left_stride + rest] * right[j * right_stride + rest];
      }
      out[i * out_stride + j] = total[j];
    }
  }
}

/// out[i][j] ← left row i · right row j, for rows of `size`.
template <class Real>
HWY_NOINLINE void multiply_transposed(const Real* left, std::int64_t lefts,
                                      std::int64_t left_stride, const Real* right,
                                      std::int64_t rights, std::int64_t right_stride,
                                      std::int64_t size, Real* out, std::int64_t out_stride) {
  constexpr int kLeft = kRegisters == 32 ? 4 : 2;
  std::int64_t j = 0;
  for (; j + 4 <= rights; j += 4) {
    const Real* four = right + j * right_stride;
    std::int64_t i = 0;
    for (; i + kLeft <= lefts; i += kLeft) {
      dot_tile<kLeft>(left + i * left_stride, left_stride, four, right_stride, size,
                      out + i * out_stride + j, out_stride);
    }
    for (; i < lefts; ++i) {
      dot_tile<1>(left + i * left_stride, left_stride, four, right_stride, size,
                  out + i * out_stride + j, out_stride);
    }
  }
  for (; j < rights; ++j) {
    for (std::int64_t i = 0; i < lefts; ++i) {
      out[i * out_stride + j] = dot(left + i * left_stride, right + j * right_stride, size);
    }
  }
}

// ---- softmax -----------------------------------------------------------------------------------

/// The largest of a row; NaN is not seen.
template <class Real>
Real largest(const Real* row, std::int64_t size) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  Real most = row[0];
  std::int64_t i = 0;
  if (size >= lanes) {
    auto vector = hn::LoadU(d, row);
    for (i = lanes; i + lanes <= size; i += lanes) vector = hn::Max(vector, hn::LoadU(d, row + i));
    most = hn::GetLane(hn::MaxOfLanes(d, vector));
  }
  for (; i < size; ++i) most = std::max(most, row[i]);
  return most;
}

/// out ← exp(row − most); returns the sum. NaN stays NaN.
template <class Real>
Real exponentials(const Real* row, Real most, std::int64_t size, Real* out) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  auto sum = hn::Zero(d);
  const auto exp = [most](auto tag, const Real* from) HWY_ATTR {
    const auto x = hn::Sub(hn::LoadU(tag, from), hn::Set(tag, most));
    return hn::IfThenElse(hn::Eq(x, x), hn::Exp(tag, x), x);
  };
  std::int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    const auto y = exp(d, row + i);
    hn::StoreU(y, d, out + i);
    sum = hn::Add(sum, y);
  }
  Real total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < size; ++i) {
    out[i] = hn::GetLane(exp(hn::CappedTag<Real, 1>(), row + i));
    total += out[i];
  }
  return total;
}

/// error ← onehot(target) − softmax(logits)
template <class Real>
void prediction_error(const Real* logits, std::int64_t target, std::int64_t size, Real* error) {
  const Real sum = exponentials(logits, largest(logits, size), size, error);
  scale_row(error, Real{-1} / sum, size, error);
  error[target] += Real{1};
}

// ---- a chunk -----------------------------------------------------------------------------------

/// Tokens `begin … begin + count − 1` of a row; a pending token is a chunk of its own, which does
/// not read.
struct Chunk {
  std::int64_t begin = 0;
  int count = 0;
  bool reads = true;
};

template <class Real>
std::vector<Chunk> chunks_of(const SoftmaxDeltaRuleParams<Real>& p) {
  std::vector<Chunk> chunks;
  std::int64_t begin = 0;
  if (p.pending && p.T > 0) chunks.push_back({begin++, 1, false});
  for (; begin < p.T; begin += kTokens) {
    chunks.push_back({begin, static_cast<int>(std::min<std::int64_t>(kTokens, p.T - begin)), true});
  }
  return chunks;
}

/// The numbers of a chunk's tokens, in fp64: products of decays, which no large sum passes through.
struct Scalars {
  std::array<double, kTokens> decay{};   // α of each token; 1 where it does not write
  std::array<double, kTokens> eta{};     // 0 where it does not write
  std::array<double, kTokens> before{};  // all decays before the token
  std::array<double, kTokens> after{};   // all decays behind it
  std::array<bool, kTokens> known{};     // whether it has a target
  double shrink = 0;                     // the decay of the whole chunk, minus one
};

template <class Real>
Scalars load_scalars(const SoftmaxDeltaRuleParams<Real>& p, std::int64_t row, const Chunk& chunk) {
  Scalars s;
  const auto first = row * p.T + chunk.begin;
  double sum = 0.0;
  double product = 1.0;
  for (int t = 0; t < chunk.count; ++t) {
    const auto i = static_cast<std::size_t>(t);
    s.known[i] = p.target[first + t] >= 0;
    const double g = p.g && s.known[i] ? load_scalar<double>(p.g.at(first + t), p.g.dtype) : 0.0;
    s.eta[i] = s.known[i] ? load_scalar<double>(p.eta.at(first + t), p.eta.dtype) : 0.0;
    s.decay[i] = std::exp(g);
    s.before[i] = product;
    product *= s.decay[i];
    sum += g;
  }
  double behind = 1.0;
  for (int t = chunk.count - 1; t >= 0; --t) {
    const auto i = static_cast<std::size_t>(t);
    s.after[i] = behind;
    behind *= s.decay[i];
  }
  s.shrink = std::expm1(sum);
  return s;
}

/// One row of a batch. The state lies in `state`, and is walked through chunk by chunk.
template <class Real>
class Walk {
 public:
  using Params = SoftmaxDeltaRuleParams<Real>;

  Walk(const Params& params, std::int64_t row)
      : p_(params),
        row_(row),
        hidden_(tokens_of(params.D)),
        reading_(tokens_of(params.D)),
        writing_(tokens_of(params.D)),
        errors_(tokens_of(params.N)),
        rows_(params.corrected.dtype == dtype_of<Real>() ? 0 : tokens_of(params.N)) {}

  /// The forward pass of the row on `state`, which holds the state before the first token.
  void forward(Real* state, Team& team) {
    for (const Chunk& chunk : chunks_of(p_)) {
      load(chunk);
      const auto writers = writers_;
      const auto shrink = shrink_;
      team.loop(divide_up(p_.N, kColumns), [&](std::int64_t task) {
        const auto begin = task * kColumns;
        const auto end = std::min(p_.N, begin + kColumns);
        write(state, writers, shrink, begin, end);
        if (chunk.reads) read(chunk, state, begin, end);
      });
      predict(chunk);
    }
    write(state, team);
  }

 private:
  static std::size_t tokens_of(std::int64_t size) {
    return static_cast<std::size_t>(kTokens * size);
  }

  std::int64_t token(const Chunk& chunk, std::int64_t t) const {
    return row_ * p_.T + chunk.begin + t;
  }

  /// Where the logits of the chunk's token `t` go, in the type of the arithmetic.
  Real* corrected(const Chunk& chunk, std::int64_t t) {
    if (rows_.size() != 0) return rows_.data() + t * p_.N;
    return static_cast<Real*>(p_.corrected.at(token(chunk, t) * p_.N));
  }

  /// Loads the chunk's hidden states and logits, normalises the former.
  void load(const Chunk& chunk) {
    scalars_ = load_scalars(p_, row_, chunk);
    for (int t = 0; t < chunk.count; ++t) {
      Real* row = hidden_.data() + t * p_.D;
      load_row(p_.h.at(token(chunk, t) * p_.D), p_.h.dtype, p_.D, row);
      scale_row(row, inverse_norm(row, p_.D), p_.D, row);
      scale_row(row, static_cast<Real>(scalars_.before[static_cast<std::size_t>(t)]), p_.D,
                reading_.data() + t * p_.D);
      load_row(p_.logits.at(token(chunk, t) * p_.N), p_.logits.dtype, p_.N, corrected(chunk, t));
    }
  }

  void read(const Chunk& chunk, const Real* state, std::int64_t begin, std::int64_t end) {
    Real* out = corrected(chunk, 0);
    multiply<Real>({.rows = chunk.count,
                    .inner = p_.D,
                    .left = reading_.data(),
                    .left_row = p_.D,
                    .left_inner = 1,
                    .right = state,
                    .right_stride = p_.N,
                    .base = out,
                    .base_stride = p_.N,
                    .out = out,
                    .out_stride = p_.N},
                   begin, end);
  }

  /// Token by token: what the earlier tokens of the chunk have written, and the error.
  void predict(const Chunk& chunk) {
    writers_ = 0;
    std::array<double, kTokens> decays{};  // of each write up to the token before this one
    std::array<double, kTokens> strengths{};
    std::array<int, kTokens> tokens{};
    for (int t = 0; t < chunk.count; ++t) {
      const auto i = static_cast<std::size_t>(t);
      Real* logits = corrected(chunk, t);
      const Real* hidden = hidden_.data() + t * p_.D;
      HWY_ALIGN Real factors[kTokens];
      for (int w = 0; w < writers_; ++w) {
        const auto k = static_cast<std::size_t>(w);
        const double product = dot(hidden, hidden_.data() + tokens[k] * p_.D, p_.D);
        factors[w] = static_cast<Real>(decays[k] * strengths[k] * product);
      }
      multiply<Real>({.rows = 1,
                      .inner = writers_,
                      .left = factors,
                      .left_row = kTokens,
                      .left_inner = 1,
                      .right = errors_.data(),
                      .right_stride = p_.N,
                      .base = logits,
                      .base_stride = p_.N,
                      .out = logits,
                      .out_stride = p_.N},
                     0, p_.N);
      if (rows_.size() != 0) {
        store_row(logits, p_.N, p_.corrected.at(token(chunk, t) * p_.N), p_.corrected.dtype);
      }
      for (int w = 0; w < writers_; ++w) decays[static_cast<std::size_t>(w)] *= scalars_.decay[i];
      if (scalars_.eta[i] == 0.0) continue;  // writes nothing, whatever its logits are
      const auto w = static_cast<std::size_t>(writers_++);
      decays[w] = 1.0;
      strengths[w] = scalars_.eta[i];
      tokens[w] = t;
      prediction_error(logits, p_.target[token(chunk, t)], p_.N, errors_.data() + w * p_.N);
    }
    shrink_ = static_cast<Real>(scalars_.shrink);
    for (int w = 0; w < writers_; ++w) {
      const auto k = static_cast<std::size_t>(w);
      scale_row(hidden_.data() + tokens[k] * p_.D, static_cast<Real>(decays[k] * strengths[k]),
                p_.D, writing_.data() + w * p_.D);
    }
  }

  /// Columns [begin, end) of the state after the chunk that was predicted last.
  void write(Real* state, int writers, Real shrink, std::int64_t begin, std::int64_t end) {
    if (writers == 0 && shrink == Real{0}) return;
    multiply<Real>({.rows = p_.D,
                    .inner = writers,
                    .left = writing_.data(),
                    .left_row = 1,
                    .left_inner = p_.D,
                    .right = errors_.data(),
                    .right_stride = p_.N,
                    .base = state,
                    .base_stride = p_.N,
                    .shrink = shrink,
                    .out = state,
                    .out_stride = p_.N},
                   begin, end);
  }

  void write(Real* state, Team& team) {
    if (writers_ == 0 && shrink_ == Real{0}) return;
    team.loop(divide_up(p_.N, kColumns), [&](std::int64_t task) {
      const auto begin = task * kColumns;
      write(state, writers_, shrink_, begin, std::min(p_.N, begin + kColumns));
    });
  }

  const Params& p_;
  std::int64_t row_;
  AlignedBuffer<Real> hidden_;   // [kTokens, D], normalised
  AlignedBuffer<Real> reading_;  // the same, times the decay before the token
  AlignedBuffer<Real> writing_;  // of each write: times its strength and the decay behind it
  AlignedBuffer<Real> errors_;   // [kTokens, N], of each write
  AlignedBuffer<Real> rows_;     // [kTokens, N], where the corrected logits are of another type
  Scalars scalars_;
  int writers_ = 0;  // of the chunk that was predicted last
  Real shrink_ = Real{0};
};

/// Calls `run(row, team)` for every row of the batch: rows side by side where there are enough of
/// them for all threads, else one after the other, each by all threads.
template <class Real, class Run>
void for_each_row(const SoftmaxDeltaRuleParams<Real>& p, const Executor& executor, const Run& run) {
  if (p.B < executor.threads) {
    Team::run(executor, [&](Team& team) {
      for (std::int64_t row = 0; row < p.B; ++row) run(row, team);
    });
    return;
  }
  executor.run(p.B, [&](std::int64_t row) {
    Team::run(serial_executor(), [&](Team& team) { run(row, team); });
  });
}

template <class Real>
void forward(const SoftmaxDeltaRuleParams<Real>& p, const Executor& executor) {
  const auto size = p.D * p.N;
  for_each_row(p, executor, [&](std::int64_t row, Team& team) {
    Real* state = p.final_state + row * size;
    if (p.initial_state == nullptr) {
      std::fill_n(state, size, Real{0});
    } else if (p.initial_state != p.final_state) {
      std::copy_n(p.initial_state + row * size, size, state);
    }
    Walk<Real>(p, row).forward(state, team);
  });
}

}  // namespace softmax_delta
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
