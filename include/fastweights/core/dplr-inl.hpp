// Rules whose step is diagonal plus low rank: S ← Diag(α) S + b (Sᵀa)ᵀ + k vᵀ, o = Sᵀq. A rule says
// how its inputs become the rows q, k, a, b, α of a token; this file walks them, forward.
// Per-target include guard.
#if defined(FASTWEIGHTS_CORE_DPLR_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_DPLR_INL_HPP_
#undef FASTWEIGHTS_CORE_DPLR_INL_HPP_
#else
#define FASTWEIGHTS_CORE_DPLR_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/panel_walk-inl.hpp"
#include "fastweights/core/rule.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// What a rule's low-rank part is made of.
enum class Correction {
  kNone,    // no a, no b: k vᵀ alone
  kDelta,   // b = −k: the state is corrected by k (v − Sᵀa)ᵀ, one write
  kGeneral  // two writes, b (Sᵀa)ᵀ and k vᵀ
};

/// The rows of one token, each of `shape.K` numbers; q carries the scale. For `Correction::kDelta`
/// b is not filled, for kNone neither is a.
template <class Real>
struct TokenRows {
  Real* q;
  Real* k;
  Real* a;
  Real* b;
  Real* decay;      // exp(log_decay)
  Real* log_decay;  // g
};

/// How many rows there are.
inline constexpr std::int64_t kTokenRows = 6;

/// Rows `step` apart, from `first` on.
template <class Real>
TokenRows<Real> token_rows(Real* first, std::int64_t step) {
  return {first,           first + step, first + 2 * step, first + 3 * step, first + 4 * step,
          first + 5 * step};
}

/// out ← a ⊙ b (out may be either).
template <class Real>
void multiply_rows(const Real* a, const Real* b, std::int64_t size, Real* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = a[i] * b[i];
}

/// The decays of a token's channels: g and exp(g), 0 and 1 without a gate.
template <class Real>
void load_decay_rows(const RuleParams<Real>& params, const Head& head, std::int64_t token,
                     const TokenRows<Real>& out) {
  const std::int64_t keys = params.shape.K;
  if (!params.channel_gate) {
    std::fill_n(out.log_decay, keys, params.g ? load_gate<Real>(params.g, head, token) : Real{0});
    std::fill_n(out.decay, keys, decay_of<Real>(params, head, token));
    return;
  }
  load_row<Real>(params.g.at(head.sequence.batch, token, head.value_head), params.g.dtype, keys,
                 out.log_decay);
  exp_row(out.log_decay, keys, out.decay);
}

template <class Real>
void load_query_row(const RuleParams<Real>& params, const Head& head, std::int64_t token,
                    Real* out) {
  load_feature_row(params, params.q, static_cast<Real>(params.scale), head, token, params.shape.K,
                   out);
}

template <class Real>
void load_key_row(const RuleParams<Real>& params, const Head& head, std::int64_t token, Real* out) {
  load_feature_row(params, params.k, Real{1}, head, token, params.shape.K, out);
}

// ---- chunkwise ---------------------------------------------------------------------------------

/// What the tokens of one chunk do to each other, and the order of its packed rows.
template <class Real, Correction kCorrection>
struct DplrChunk {
  static constexpr bool kReads = kCorrection != Correction::kNone;
  static constexpr bool kTwoWrites = kCorrection == Correction::kGeneral;
  static constexpr int kQueries = kReads ? kChunk : 0;  // first row of the queries; reads are 0
  static constexpr int kKeys = kQueries + kChunk;
  static constexpr int kSecondKeys = kKeys + kChunk;
  static constexpr int kRows = kSecondKeys + (kTwoWrites ? kChunk : 0);

  Real ak[kChunk][kChunk];  // a_i · Γ(j, i−1] k_j below the diagonal
  Real ab[kChunk][kChunk];  // the same with b_j
  Real qk[kChunk][kChunk];  // q_i · Γ(j, i] k_j on and below it
  Real qb[kChunk][kChunk];
};

/// Packed inputs of up to `kBlock` tokens of one head.
template <class Real, Correction kCorrection>
struct DplrBlock {
  using Chunk = DplrChunk<Real, kCorrection>;

  explicit DplrBlock(const Shape& shape)
      : padded_keys(round_up(shape.K, static_cast<std::int64_t>(hn::MaxLanes(Tag<Real>())))),
        inputs(size(kTokenRows * kChunk * kRowStride<Real>)),
        rows(size(kChunksPerBlock * Chunk::kRows * kRowStride<Real>)),
        decay(size(kChunksPerBlock * kRowStride<Real>)) {
    std::fill_n(inputs.data(), kTokenRows * kChunk * kRowStride<Real>, Real{0});
  }

  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

  TokenRows<Real> token(int i) {
    return token_rows(inputs.data() + i * kRowStride<Real>, kChunk * kRowStride<Real>);
  }
  Real* packed(std::int64_t chunk, int row) {
    return rows.data() + (chunk * Chunk::kRows + row) * kRowStride<Real>;
  }
  Real* chunk_decay(std::int64_t chunk) { return decay.data() + chunk * kRowStride<Real>; }

  std::int64_t padded_keys;    // K in whole vectors
  AlignedBuffer<Real> inputs;  // [kTokenRows, C, kRowStride]: the chunk being packed
  AlignedBuffer<Real> rows;    // [chunks, kRows, kRowStride]
  AlignedBuffer<Real> decay;   // [chunks, kRowStride]: factors of the stored state
  Chunk chunks[kChunksPerBlock];
};

/// Products of written row j with the reading rows of the tokens from j on:
/// with_a[i] = a_i · Γ(j, i−1] w for i > j, with_q[i] = q_i · Γ(j, i] w for i ≥ j.
template <bool kReads, int kFirst, class Real>
HWY_INLINE void multiply_decayed(const TokenRows<Real>& first, const Real* written,
                                 std::int64_t keys, Real (&with_a)[kChunk][kChunk],
                                 Real (&with_q)[kChunk][kChunk]) {
  const Tag<Real> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  constexpr std::int64_t kStride = kRowStride<Real>;
  Vector<Real> sums[2 * kChunk];  // with a, then with q
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kChunk; ++i) sums[i] = hn::Zero(d);
  for (std::int64_t c = 0; c < keys; c += kLanes) {  // rows are padded with zeros
    auto w = hn::Load(d, written + c);
#pragma GCC unroll 8
    for (int i = kFirst; i < kChunk; ++i) {
      const std::int64_t at = i * kStride + c;
      if (i > kFirst) {
        if constexpr (kReads) sums[i] = hn::MulAdd(hn::Load(d, first.a + at), w, sums[i]);
        w = hn::Mul(w, hn::Load(d, first.decay + at));
      }
      sums[kChunk + i] = hn::MulAdd(hn::Load(d, first.q + at), w, sums[kChunk + i]);
    }
  }
  alignas(64) Real dots[2 * kChunk];
  sum_each(d, sums, 2 * kChunk, dots);
  for (int i = kFirst; i < kChunk; ++i) {
    with_a[i][kFirst] = dots[i];
    with_q[i][kFirst] = dots[kChunk + i];
  }
}

template <bool kReads, class Real>
HWY_NOINLINE void multiply_all_decayed(const TokenRows<Real>& first, const Real* written,
                                       std::int64_t keys, Real (&with_a)[kChunk][kChunk],
                                       Real (&with_q)[kChunk][kChunk]) {
  const auto columns = [&]<int... kColumn>(std::integer_sequence<int, kColumn...>) HWY_ATTR {
    (multiply_decayed<kReads, kColumn>(first, written + kColumn * kRowStride<Real>, keys, with_a,
                                       with_q),
     ...);
  };
  columns(std::make_integer_sequence<int, kChunk>());
}

/// The decays of each channel of a state that are not applied yet, as `PendingDecay` has them. Here
/// they gather as logarithms, which cost one exponential for each chunk.
template <class Real>
struct PendingChannels {
  explicit PendingChannels(const Shape& shape)
      : channels(static_cast<std::int32_t>(round_up(shape.K, kLanes))),
        log(static_cast<std::size_t>(channels)),
        scale(log.size()),
        inverse(log.size()) {
    clear();
  }

  /// Nothing waits.
  void clear() {
    std::fill_n(log.data(), log.size(), 0.0);
    std::fill_n(scale.data(), scale.size(), Real{1});
    std::fill_n(inverse.data(), inverse.size(), Real{1});
  }

  /// As it was when `log` held `saved`.
  void restore(const double* saved) {
    std::copy_n(saved, log.size(), log.data());
    for (std::int64_t c = 0; c < channels; ++c) scale.data()[c] = static_cast<Real>(saved[c]);
    exp_row(scale.data(), channels, scale.data());
    for (std::int64_t c = 0; c < channels; ++c) inverse.data()[c] = 1 / scale.data()[c];
  }

  /// Adds a chunk's log-decays; `factors` become those of the stored state.
  void take(const Real* log_decays, bool settle, Real* factors) {
    double* pending = log.data();
    for (std::int64_t c = 0; c < channels; ++c) {
      pending[c] += static_cast<double>(log_decays[c]);
      factors[c] = static_cast<Real>(pending[c]);
    }
    exp_row(factors, channels, factors);
    const Tag<Real> d;
    const auto one = hn::Set(d, Real{1});
    const auto least = hn::Set(d, static_cast<Real>(settle ? 2 * kMostPending : kLeastPending));
    const auto most = hn::Set(d, static_cast<Real>(kMostPending));
    alignas(64) Real applied[kRowStride<Real>];
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      const auto whole = hn::Load(d, factors + c);
      const auto waits = hn::And(hn::Ge(whole, least), hn::Le(whole, most));
      const auto waiting = hn::IfThenElse(waits, whole, one);
      hn::Store(hn::IfThenElse(waits, one, whole), d, factors + c);
      hn::Store(waiting, d, scale.data() + c);
      hn::Store(hn::Div(one, waiting), d, inverse.data() + c);
      hn::Store(hn::IfThenZeroElse(waits, one), d, applied + c);
    }
    for (std::int64_t c = 0; c < channels; ++c) pending[c] = applied[c] == 0 ? pending[c] : 0.0;
  }

  static constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(Tag<Real>()));
  std::int32_t channels;  // K in whole vectors
  AlignedBuffer<double> log;
  AlignedBuffer<Real> scale;    // the state over what is stored of it
  AlignedBuffer<Real> inverse;  // 1 / scale
};

/// Decays the rows of a loaded chunk to its start or end, as what is stored of the state needs it.
template <class Real, Correction kCorrection>
void pack_chunk(bool settle, PendingChannels<Real>& pending, DplrBlock<Real, kCorrection>& block,
                std::int64_t chunk) {
  using Chunk = DplrChunk<Real, kCorrection>;
  const Tag<Real> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  constexpr std::int64_t kStride = kRowStride<Real>;
  const auto x = block.token(0);
  Real* reads = block.packed(chunk, 0);
  Real* queries = block.packed(chunk, Chunk::kQueries);
  Real* keys = block.packed(chunk, Chunk::kKeys);
  Real* second = keys + kChunk * kStride;  // there only with two writes
  alignas(64) Real log_decays[kRowStride<Real>];
  for (std::int64_t c = 0; c < block.padded_keys; c += kLanes) {
    auto running = hn::Load(d, pending.scale.data() + c);
    auto sum = hn::Zero(d);
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
      const std::int64_t at = i * kStride + c;
      sum = hn::Add(sum, hn::Load(d, x.log_decay + at));
      if constexpr (Chunk::kReads) {
        hn::Store(hn::Mul(running, hn::Load(d, x.a + at)), d, reads + at);
      }
      running = hn::Mul(running, hn::Load(d, x.decay + at));
      hn::Store(hn::Mul(running, hn::Load(d, x.q + at)), d, queries + at);
    }
    hn::Store(sum, d, log_decays + c);
  }
  pending.take(log_decays, settle, block.chunk_decay(chunk));
  for (std::int64_t c = 0; c < block.padded_keys; c += kLanes) {
    auto running = hn::Load(d, pending.inverse.data() + c);
#pragma GCC unroll 8
    for (int i = kChunk - 1; i >= 0; --i) {
      const std::int64_t at = i * kStride + c;
      hn::Store(hn::Mul(running, hn::Load(d, x.k + at)), d, keys + at);
      if constexpr (Chunk::kTwoWrites) {
        hn::Store(hn::Mul(running, hn::Load(d, x.b + at)), d, second + at);
      }
      running = hn::Mul(running, hn::Load(d, x.decay + at));
    }
  }
  auto& out = block.chunks[chunk];
  multiply_all_decayed<Chunk::kReads>(x, x.k, block.padded_keys, out.ak, out.qk);
  if constexpr (Chunk::kTwoWrites) {
    multiply_all_decayed<true>(x, x.b, block.padded_keys, out.ab, out.qb);
  }
}

/// What `DplrForm` writes beside the state.
enum class DplrEmit {
  kOutput,  // o
  kLowRank  // what the backward pass can't know: v − Sᵀa for Correction::kDelta, Sᵀa for kGeneral
};

/// `Rule` on packed tokens.
template <class Rule, DplrEmit kEmit = DplrEmit::kOutput>
struct DplrForm {
  static constexpr int kStates = 1;
  static constexpr int kReads =
      (Rule::kCorrection == Correction::kNone ? 0 : 1) + (kEmit == DplrEmit::kOutput ? 1 : 0);
  static constexpr Correction kCorrection = Rule::kCorrection;
  template <class Real>
  using Block = DplrBlock<Real, kCorrection>;
  template <class Real>
  using Pending = PendingChannels<Real>;

  /// Missing tokens of the last chunk write nothing and do not decay.
  template <class Real>
  static void pack(const RuleParams<Real>& params, const Head& head, std::int64_t begin,
                   std::int64_t count, bool settle, Pending<Real>& pending, Block<Real>& block) {
    const std::int64_t keys = params.shape.K;
    for (std::int64_t chunk = 0; chunk * kChunk < count; ++chunk) {
      for (int i = 0; i < kChunk; ++i) {
        const std::int64_t token = chunk * kChunk + i;
        const auto x = block.token(i);
        if (token < count) {
          Rule::load(params, head, head.sequence.begin + begin + token, x);
        } else {
          for (Real* row : {x.q, x.k, x.a, x.b}) std::fill_n(row, keys, Real{0});
          std::fill_n(x.decay, keys, Real{1});
          std::fill_n(x.log_decay, keys, Real{0});
        }
      }
      pack_chunk(settle && (chunk + 1) * kChunk >= count, pending, block, chunk);
    }
  }

  template <class Real>
  static HWY_INLINE void step(Block<Real>& block, std::int64_t chunk, const Shape& shape,
                              const ChunkRows<Real>& rows, RowPrefetch<Real>& prefetch, Real* state,
                              Real* /*second*/) {
    using Chunk = DplrChunk<Real, kCorrection>;
    constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
    const Tag<Real> d;
    const Chunk& c = block.chunks[chunk];
    const auto value = [&](int i, int j) HWY_ATTR {
      return hn::LoadU(d, rows.values + i * rows.value_stride + j * kLanes);
    };
    Vector<Real> reads[kChunk][kPanelVectors];   // Sᵀa, then what b writes
    Vector<Real> writes[kChunk][kPanelVectors];  // of the keys k
    if constexpr (Chunk::kReads) {
      read_state(state, kPanel<Real>, block.packed(chunk, 0), shape.K, prefetch, reads);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) {
        writes[i][j] = value(i, j);
        if constexpr (kCorrection == Correction::kDelta) {
          writes[i][j] = hn::Sub(writes[i][j], reads[i][j]);
        }
      }
    }
    // What is known is taken to all later tokens at once: a chain of C steps, not of C²/2.
    if constexpr (Chunk::kReads) {
#pragma GCC unroll 8
      for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 8
        for (int later = i + 1; later < kChunk; ++later) {
          const auto ak = hn::Set(d, c.ak[later][i]);
#pragma GCC unroll 2
          for (int j = 0; j < kPanelVectors; ++j) {
            if constexpr (kCorrection == Correction::kDelta) {
              writes[later][j] = hn::NegMulAdd(ak, writes[i][j], writes[later][j]);
            } else {
              const auto ab = hn::Set(d, c.ab[later][i]);
              reads[later][j] = hn::MulAdd(ak, writes[i][j], reads[later][j]);
              reads[later][j] = hn::MulAdd(ab, reads[i][j], reads[later][j]);
            }
          }
        }
      }
    }
    const auto emit = [&](int i, int j, Vector<Real> out) HWY_ATTR {
      hn::StoreU(out, d, rows.outputs + i * rows.output_stride + j * kLanes);
    };
    if constexpr (kEmit == DplrEmit::kLowRank) {
#pragma GCC unroll 8
      for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVectors; ++j) {
          if constexpr (kCorrection == Correction::kDelta) emit(i, j, writes[i][j]);
          if constexpr (kCorrection == Correction::kGeneral) emit(i, j, reads[i][j]);
        }
      }
    } else {
      Vector<Real> outputs[kChunk][kPanelVectors];
      read_state(state, kPanel<Real>, block.packed(chunk, Chunk::kQueries), shape.K, prefetch,
                 outputs);
#pragma GCC unroll 8
      for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVectors; ++j) {
          auto output = outputs[i][j];
#pragma GCC unroll 8
          for (int before = 0; before <= i; ++before) {
            output = hn::MulAdd(hn::Set(d, c.qk[i][before]), writes[before][j], output);
            if constexpr (Chunk::kTwoWrites) {
              output = hn::MulAdd(hn::Set(d, c.qb[i][before]), reads[before][j], output);
            }
          }
          emit(i, j, output);
        }
      }
    }
    const Real* factors = block.chunk_decay(chunk);
    const auto decay = [factors, d](std::int64_t r, Vector<Real> row)
                           HWY_ATTR { return hn::Mul(hn::Set(d, factors[r]), row); };
    const auto keep = [](std::int64_t, Vector<Real> row) HWY_ATTR { return row; };
    write_state(state, kPanel<Real>, block.packed(chunk, Chunk::kKeys), shape.K, decay, writes);
    if constexpr (Chunk::kTwoWrites) {
      write_state(state, kPanel<Real>, block.packed(chunk, Chunk::kSecondKeys), shape.K, keep,
                  reads);
    }
  }
};

/// The chunkwise form of `Rule`.
template <class Rule, class Real>
void dplr_forward(const RuleParams<Real>& params, const Executor& executor) {
  forward_chunkwise<DplrForm<Rule>>(params, executor);
}

// ---- recurrent ---------------------------------------------------------------------------------

/// One token on `kVectors` vectors of columns, in place.
template <Correction kCorrection, int kVectors, class D, class Real, class Stored>
HWY_INLINE void step_dplr_columns(D d, const TokenRows<Real>& x, std::int64_t keys,
                                  std::int64_t values, const Real* HWY_RESTRICT v,
                                  Stored* HWY_RESTRICT state, Real* HWY_RESTRICT out) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<D> read[kVectors], write[kVectors], output[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    read[j] = output[j] = hn::Zero(d);
    write[j] = hn::LoadU(d, v + j * lanes);
  }
  if constexpr (kCorrection != Correction::kNone) {
    const Stored* row = state;
    for (std::int64_t r = 0; r < keys; ++r, row += values) {
      const auto a = hn::Set(d, x.a[r]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        read[j] = hn::MulAdd(a, load_stored(d, row + j * lanes), read[j]);
      }
    }
  }
  if constexpr (kCorrection == Correction::kDelta) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) write[j] = hn::Sub(write[j], read[j]);
  }
  Stored* row = state;
  for (std::int64_t r = 0; r < keys; ++r, row += values) {
    const auto decay = hn::Set(d, x.decay[r]);
    const auto k = hn::Set(d, x.k[r]);
    const auto q = hn::Set(d, x.q[r]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      auto s = hn::Mul(decay, load_stored(d, row + j * lanes));
      s = hn::MulAdd(k, write[j], s);
      if constexpr (kCorrection == Correction::kGeneral) {
        s = hn::MulAdd(hn::Set(d, x.b[r]), read[j], s);
      }
      output[j] = hn::MulAdd(q, s, output[j]);
      store_stored(s, d, row + j * lanes);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) hn::StoreU(output[j], d, out + j * lanes);
}

/// Calls `body(tag, vectors, column)` for blocks of columns that cover [0, values).
template <class Real, class Body>
HWY_INLINE void for_each_column_block(std::int64_t values, const Body& body) {
  const Tag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t column = 0;
  for (; column + 4 * lanes <= values; column += 4 * lanes) {
    body(d, std::integral_constant<int, 4>(), column);
  }
  for (; column + lanes <= values; column += lanes) {
    body(d, std::integral_constant<int, 1>(), column);
  }
  const hn::CappedTag<Real, 1> one;
  for (; column < values; ++column) body(one, std::integral_constant<int, 1>(), column);
}

/// Walks one head's sequence token by token; a state in bf16 is rounded after each.
template <class Rule, class Real, class Stored>
void walk_dplr_tokens(const RuleParams<Real>& params, const Head& head, Stored* state) {
  const Shape& shape = params.shape;
  alignas(64) Real rows[kTokenRows][kMaxHeadSize];
  alignas(64) Real v[kMaxHeadSize];
  alignas(64) Real out[kMaxHeadSize];
  const TokenRows<Real> x = token_rows(rows[0], kMaxHeadSize);
  for (std::int64_t i = 0; i < head.sequence.length; ++i) {
    const std::int64_t t = head.sequence.begin + i;
    Rule::load(params, head, t, x);
    load_row<Real>(params.v.at(head.sequence.batch, t, head.value_head), params.v.dtype, shape.V,
                   v);
    for_each_column_block<Real>(shape.V, [&](auto d, auto vectors, std::int64_t c) HWY_ATTR {
      step_dplr_columns<Rule::kCorrection, decltype(vectors)::value>(d, x, shape.K, shape.V, v + c,
                                                                     state + c, out + c);
    });
    store_row(out, shape.V, params.o.at(head.sequence.batch, t, head.value_head), params.o.dtype);
  }
}

template <class Rule, class Real>
void dplr_recurrent_head(const RuleParams<Real>& params, std::int64_t n, std::int64_t value_head) {
  const Head head = head_of(params, n, value_head);
  const std::int64_t offset = params.state_offset(n, value_head);
  if constexpr (std::is_same_v<Real, float>) {
    if (params.narrow_state != nullptr && head.sequence.length == 1) {
      return walk_dplr_tokens<Rule>(params, head, params.narrow_state + offset);
    }
  }
  const WorkingState<Real> state(params.initial_state, params.final_state, params.narrow_state,
                                 offset, params.shape);
  walk_dplr_tokens<Rule>(params, head, state.data());
}

/// The recurrent form of `Rule`. One of `final_state` and `narrow_state` must not be null.
template <class Rule, class Real>
void dplr_recurrent(const RuleParams<Real>& params, const Executor& executor) {
  executor.run(params.sequences() * params.shape.HV, [&](std::int64_t task) {
    dplr_recurrent_head<Rule>(params, task / params.shape.HV, task % params.shape.HV);
  });
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
