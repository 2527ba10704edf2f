// The chunkwise form of the (gated) delta rule, forward. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_CHUNKWISE_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_CHUNKWISE_INL_HPP_
#undef FASTWEIGHTS_CORE_CHUNKWISE_INL_HPP_
#else
#define FASTWEIGHTS_CORE_CHUNKWISE_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/panel_walk-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// What the tokens of one chunk do to each other; the state does not enter.
template <class Real>
struct ChunkCoefficients {
  Real kk[kChunk][kChunk];  // Γ_ij (k_i · k_j) below the diagonal
  Real qk[kChunk][kChunk];  // Γ_ij (q_i · k_j) on and below it; q carries the scale
  Real from_start[kChunk];  // γ_i: decay from the chunk's start to after token i, on what is stored
  Real to_end[kChunk];      // Γ_Ci: from after token i to the chunk's end, as it will be stored
  Real beta[kChunk];
  Real before = 1;  // the state before the chunk over what is stored of it
  Real factor = 1;  // of the stored state
};

/// Packed keys and queries of up to `kBlock` tokens of one head.
template <class Real>
struct DeltaBlock {
  explicit DeltaBlock(const Shape& shape)
      : padded_keys(round_up(shape.K, static_cast<std::int64_t>(hn::MaxLanes(Tag<Real>())))),
        rows(static_cast<std::size_t>(kBlock * 2 * kRowStride<Real>)) {}

  /// The keys of a chunk; its queries follow them.
  Real* keys(std::int64_t chunk) { return rows.data() + chunk * 2 * kChunk * kRowStride<Real>; }
  Real* queries(std::int64_t chunk) { return keys(chunk) + kChunk * kRowStride<Real>; }

  std::int64_t padded_keys;  // K in whole vectors
  AlignedBuffer<Real> rows;  // [chunks, 2, C, kRowStride]
  ChunkCoefficients<Real> coefficients[kChunksPerBlock];
};

/// Dot products of one pair of columns of the triangles: keys j and C − 1 − j with the later keys
/// and queries. Together they are 2 C sums, whatever j.
template <int kColumn, class Real>
HWY_INLINE void multiply_columns(const Real* keys, std::int64_t size,
                                 ChunkCoefficients<Real>& out) {
  constexpr int kOther = kChunk - 1 - kColumn;
  constexpr std::int64_t kStride = kRowStride<Real>;
  const Real* queries = keys + kChunk * kStride;
  const Real* first = keys + kColumn * kStride;
  const Real* second = keys + kOther * kStride;
  Vector<Real> sums[2 * kChunk];
  alignas(64) Real dots[2 * kChunk];
  constexpr int kLater = kOther;        // keys after the column's own
  constexpr int kLaterOther = kColumn;  // after the other's
  add_dots<kLater>(first, first + kStride, size, sums);
  add_dots<kLater + 1>(first, queries + kColumn * kStride, size, sums + kLater);
  add_dots<kLaterOther>(second, second + kStride, size, sums + 2 * kLater + 1);
  add_dots<kLaterOther + 1>(second, queries + kOther * kStride, size,
                            sums + 2 * kLater + 1 + kLaterOther);
  sum_each(Tag<Real>(), sums, 2 * kChunk, dots);
  for (int i = 0; i < kLater; ++i) out.kk[kColumn + 1 + i][kColumn] = dots[i];
  for (int i = 0; i <= kLater; ++i) out.qk[kColumn + i][kColumn] = dots[kLater + i];
  const Real* rest = dots + 2 * kLater + 1;
  for (int i = 0; i < kLaterOther; ++i) out.kk[kOther + 1 + i][kOther] = rest[i];
  for (int i = 0; i <= kLaterOther; ++i) out.qk[kOther + i][kOther] = rest[kLaterOther + i];
}

/// The bare products of a chunk's keys and queries: kk below the diagonal, qk on and below it.
template <class Real>
HWY_NOINLINE void multiply_pairs(const Real* keys, std::int64_t size,
                                 ChunkCoefficients<Real>& out) {
  static_assert(kChunk == 8);
  multiply_columns<0>(keys, size, out);
  multiply_columns<1>(keys, size, out);
  multiply_columns<2>(keys, size, out);
  multiply_columns<3>(keys, size, out);
}

/// Decays the products of a chunk's first tokens, and fills the decays to and from its ends.
template <int kTokens = kChunk, class Real>
void decay_pairs(const Real* decay, ChunkCoefficients<Real>& out) {
  Real product = 1;
  for (int i = 0; i < kTokens; ++i) out.from_start[i] = product *= decay[i];
  for (int j = 0; j < kTokens; ++j) {
    Real gamma = 1;  // Γ_ij, token by token
    for (int i = j + 1; i < kTokens; ++i) {
      gamma *= decay[i];
      out.kk[i][j] *= gamma;
      out.qk[i][j] *= gamma;
    }
    out.to_end[j] = gamma;
  }
  out.factor = product;
}

/// Lets a chunk's decay, exp(log_decay), wait with the others, unless it has to be applied.
template <class Real>
void defer_decay(double log_decay, bool settle, PendingDecay& pending,
                 ChunkCoefficients<Real>& out) {
  out.before = static_cast<Real>(pending.scale());
  out.factor = static_cast<Real>(pending.take(std::exp(log_decay), settle));
  const auto after = static_cast<Real>(1 / pending.scale());
  for (Real& factor : out.from_start) factor *= out.before;
  for (Real& factor : out.to_end) factor *= after;
}

/// Packs a key or query row of one token, zeros where there is none.
template <class Real>
void pack_feature_row(const RuleParams<Real>& params, const ConstView& view, Real scale,
                      const Head& head, std::int64_t token, bool present, std::int64_t padded,
                      Real* out) {
  if (present && view) {
    load_feature_row(params, view, scale, head, token, padded, out);
  } else {
    std::fill_n(out, padded, Real{0});
  }
}

/// What `DeltaForm` writes beside the state.
enum class Emit {
  kOutput,  // o
  kError,   // e_i = v_i − α_i S_{i−1}ᵀ k_i, which the backward pass needs
};

/// The (gated) delta rule on packed tokens.
template <Emit kEmit>
struct DeltaForm {
  static constexpr int kStates = 1;
  static constexpr int kReads = kEmit == Emit::kOutput ? 2 : 1;
  template <class Real>
  using Block = DeltaBlock<Real>;

  template <class Real>
  struct Pending : PendingDecay {
    explicit Pending(const Shape& /*shape*/) {}
  };

  /// Missing tokens of the last chunk become zero keys with β = 0 and no decay, which leave the
  /// state alone.
  template <class Real>
  static void pack(const RuleParams<Real>& params, const Head& head, std::int64_t begin,
                   std::int64_t count, bool settle, PendingDecay& pending,
                   DeltaBlock<Real>& block) {
    const std::int64_t first = head.sequence.begin + begin;
    const auto scale = static_cast<Real>(params.scale);
    alignas(64) Real log_decay[kBlock];
    alignas(64) Real decay[kBlock];
    alignas(64) Real beta[kBlock];
    load_log_decays(params, head, begin, count, log_decay);
    exp_row(log_decay, kBlock, decay);
    load_gates(params.beta, head, begin, count, Real{0}, beta);
    for (std::int64_t chunk = 0; chunk * kChunk < count; ++chunk) {
      const std::int64_t token = chunk * kChunk;
      for (int i = 0; i < kChunk; ++i) {
        const bool present = token + i < count;
        const std::int64_t at = i * kRowStride<Real>;
        pack_feature_row(params, params.k, Real{1}, head, first + token + i, present,
                         block.padded_keys, block.keys(chunk) + at);
        pack_feature_row(params, params.q, scale, head, first + token + i, present,
                         block.padded_keys, block.queries(chunk) + at);
      }
      auto& coefficients = block.coefficients[chunk];
      std::copy_n(beta + token, kChunk, coefficients.beta);
      multiply_pairs(block.keys(chunk), block.padded_keys, coefficients);
      decay_pairs(decay + token, coefficients);
      if (!params.g) continue;
      double sum = 0;
      for (int i = 0; i < kChunk; ++i) sum += static_cast<double>(log_decay[token + i]);
      defer_decay(sum, settle && token + kChunk >= count, pending, coefficients);
    }
  }

  template <class Real>
  static HWY_INLINE void step(DeltaBlock<Real>& block, std::int64_t chunk, const Shape& shape,
                              const ChunkRows<Real>& rows, RowPrefetch<Real>& prefetch, Real* state,
                              Real* /*second*/) {
    const Tag<Real> d;
    constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
    const auto& c = block.coefficients[chunk];
    const Real* keys = block.keys(chunk);
    Vector<Real> writes[kChunk][kPanelVectors];  // reads of the keys, then e, then u
    read_state(state, kPanel<Real>, keys, shape.K, prefetch, writes);
    const auto value = [&](int i, int j) HWY_ATTR {
      return hn::LoadU(d, rows.values + i * rows.value_stride + j * kLanes);
    };
    const auto emit = [&](int i, int j, Vector<Real> out) HWY_ATTR {
      hn::StoreU(out, d, rows.outputs + i * rows.output_stride + j * kLanes);
    };
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) {
        writes[i][j] = hn::NegMulAdd(hn::Set(d, c.from_start[i]), writes[i][j], value(i, j));
      }
    }
    // Each error is taken out of all later ones at once: a chain of C steps, not of C²/2.
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) {
        if constexpr (kEmit == Emit::kError) emit(i, j, writes[i][j]);
        writes[i][j] = hn::Mul(hn::Set(d, c.beta[i]), writes[i][j]);
      }
#pragma GCC unroll 8
      for (int later = i + 1; later < kChunk; ++later) {
        const auto product = hn::Set(d, c.kk[later][i]);
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVectors; ++j) {
          writes[later][j] = hn::NegMulAdd(product, writes[i][j], writes[later][j]);
        }
      }
    }
    if constexpr (kEmit == Emit::kOutput) {
      Vector<Real> outputs[kChunk][kPanelVectors];
      read_state(state, kPanel<Real>, block.queries(chunk), shape.K, prefetch, outputs);
#pragma GCC unroll 8
      for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVectors; ++j) {
          auto output = hn::Mul(hn::Set(d, c.from_start[i]), outputs[i][j]);
#pragma GCC unroll 8
          for (int before = 0; before <= i; ++before) {
            output = hn::MulAdd(hn::Set(d, c.qk[i][before]), writes[before][j], output);
          }
          emit(i, j, output);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) {
        writes[i][j] = hn::Mul(hn::Set(d, c.to_end[i]), writes[i][j]);
      }
    }
    const auto factor = hn::Set(d, c.factor);
    const auto decay = [factor](std::int64_t, Vector<Real> row)
                           HWY_ATTR { return hn::Mul(factor, row); };
    write_state(state, kPanel<Real>, keys, shape.K, decay, writes);
  }
};

/// The chunkwise form over all heads.
template <class Real>
void forward(const RuleParams<Real>& params, const Executor& executor) {
  forward_chunkwise<DeltaForm<Emit::kOutput>>(params, executor);
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
