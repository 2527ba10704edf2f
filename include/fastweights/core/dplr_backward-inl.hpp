// Gradients of the rules of dplr-inl.hpp, chunk by chunk. Names follow the derivation in
// docs/generalized_delta_rule.md. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_DPLR_BACKWARD_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_DPLR_BACKWARD_INL_HPP_
#undef FASTWEIGHTS_CORE_DPLR_BACKWARD_INL_HPP_
#else
#define FASTWEIGHTS_CORE_DPLR_BACKWARD_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/dplr-inl.hpp"
#include "fastweights/core/row_gradients-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// Rows of one chunk, decayed to its ends as the stored states and gradients of states need it.
template <Correction kCorrection>
struct DplrBackwardRows {
  static constexpr bool kReads = kCorrection != Correction::kNone;
  static constexpr bool kTwoWrites = kCorrection == Correction::kGeneral;
  static constexpr int kSecond = kTwoWrites ? kChunk : 0;
  // What the state takes, k and b decayed to the chunk's end.
  static constexpr int kStateKeys = 0;
  static constexpr int kStateSecondKeys = kStateKeys + kChunk;
  // What is read from the gradient of the state, the same rows.
  static constexpr int kKeys = kStateSecondKeys + kSecond;
  static constexpr int kSecondKeys = kKeys + kChunk;
  // What that gradient takes, a and q decayed from the chunk's start.
  static constexpr int kQueries = kSecondKeys + kSecond;
  static constexpr int kReadKeys = kQueries + kChunk;
  static constexpr int kRows = kReadKeys + (kReads ? kChunk : 0);
};

/// A row over the channels, for each chunk.
template <class Real>
struct ChannelRows {
  Real* state_scale;    // the state before the chunk over what is stored of it
  Real* state_factor;   // of the stored state
  Real* d_state_scale;  // the gradient of the state after the chunk over what is stored of it
  Real* d_state_factor;
  Real* whole;  // γ_C and both scales
  Real* kept;   // Σ_v of what is stored of the state ⊙ its gradient
};
inline constexpr std::int64_t kChannelRows = 6;

/// Scratch of one key head's backward pass. A segment is a block of tokens between two states that
/// are kept.
template <Correction kCorrection, class Real>
struct DplrBackwardScratch {
  using Rows = DplrBackwardRows<kCorrection>;
  using Chunk = DplrChunk<Real, kCorrection>;
  // `transpose` moves whole blocks, and so reads this far past the last row of a state.
  static constexpr std::int64_t kSlack = kTransposeBlock<Real> * kPanel<Real>;

  DplrBackwardScratch(const RuleParams<Real>& params, std::int64_t tokens)
      : shape(params.shape),
        key_stride(round_up(shape.K, kPanel<Real>)),
        value_stride(round_up(shape.V, kPanel<Real>)),
        state_size(value_stride * shape.K),
        segments(divide_up(tokens, kBlock)),
        shared(params.value_heads_per_key_head() > 1),
        summed_tokens(shared ? tokens : kBlock),
        pending(shape),
        d_pending(shape),
        checkpoints(static_cast<std::size_t>(segments * state_size + kSlack)),
        pending_logs(zeros<double>(segments * pending.channels)),
        pairs(static_cast<std::size_t>(segments * kChunksPerBlock)),
        low_rank(static_cast<std::size_t>(Rows::kReads ? segments * kBlock * value_stride : 0)),
        sums(zeros<Real>(4 * summed_tokens * key_stride)),
        rows(zeros<Real>(kTokenRows * kBlock * key_stride)),
        d_rows(zeros<Real>(kTokenRows * kBlock * key_stride)),
        values(zeros<Real>(kBlock * value_stride)),
        d_outputs(zeros<Real>(kBlock * value_stride)),
        d_values(zeros<Real>(kBlock * value_stride)),
        d_reads(zeros<Real>(Rows::kTwoWrites ? kBlock * value_stride : 0)),
        packed(zeros<Real>(kChunksPerBlock * Rows::kRows * kRowStride<Real>)),
        channels(zeros<Real>(kChunksPerBlock * kChannelRows * kRowStride<Real>)),
        state(zeros<Real>(state_size)),
        d_state(zeros<Real>(state_size + kSlack)),
        d_state_transposed(zeros<Real>(kPanel<Real> * key_stride)),
        states_transposed(zeros<Real>(kChunksPerBlock * kPanel<Real> * key_stride)) {
    std::fill_n(checkpoints.data() + segments * state_size, kSlack, Real{0});
  }

  template <class T>
  static AlignedBuffer<T> zeros(std::int64_t size) {
    AlignedBuffer<T> buffer(static_cast<std::size_t>(size));
    std::fill_n(buffer.data(), size, T{0});
    return buffer;
  }

  std::int64_t value_panels() const { return value_stride / kPanel<Real>; }
  std::int64_t key_panels() const { return key_stride / kPanel<Real>; }

  TokenRows<Real> of(AlignedBuffer<Real>& buffer, std::int64_t i) const {
    return token_rows(buffer.data() + i * key_stride, kBlock * key_stride);
  }
  KeyHeadGradients<Real> sum(std::int64_t token, std::int64_t in_segment) {
    Real* first = sums.data() + (shared ? token : in_segment) * key_stride;
    const std::int64_t step = summed_tokens * key_stride;
    return {first, first + step, first + 2 * step, first + 3 * step};
  }
  Real* packed_row(std::int64_t chunk, int row) {
    return packed.data() + (chunk * Rows::kRows + row) * kRowStride<Real>;
  }
  ChannelRows<Real> channel_rows(std::int64_t chunk) {
    Real* first = channels.data() + chunk * kChannelRows * kRowStride<Real>;
    constexpr std::int64_t kStride = kRowStride<Real>;
    return {first,
            first + kStride,
            first + 2 * kStride,
            first + 3 * kStride,
            first + 4 * kStride,
            first + 5 * kStride};
  }
  Real* state_transposed(std::int64_t chunk) {
    return states_transposed.data() + chunk * kPanel<Real> * key_stride;
  }
  /// What is written with k by the segment's tokens, and what with b.
  const Real* written(std::int64_t begin) {
    return kCorrection == Correction::kDelta ? read(begin) : values.data();
  }
  const Real* read(std::int64_t begin) { return low_rank.data() + begin * value_stride; }

  Shape shape;
  std::int64_t key_stride;
  std::int64_t value_stride;
  std::int64_t state_size;
  std::int64_t segments;
  bool shared;
  std::int64_t summed_tokens;
  PendingChannels<Real> pending;    // of the state
  PendingChannels<Real> d_pending;  // of its gradient
  RowPrefetch<Real> prefetch;       // aims at nothing: `read_state` wants one
  // Of the whole sequence:
  AlignedBuffer<Real> checkpoints;     // the state before each segment, panel-major [K, V]
  AlignedBuffer<double> pending_logs;  // [segments, K]: what was pending then
  AlignedBuffer<Chunk> pairs;          // [chunks]
  AlignedBuffer<Real> low_rank;        // [tokens, V]: DplrEmit::kLowRank
  AlignedBuffer<Real> sums;            // [q k a b, tokens, K]: KeyHeadGradients; a segment's if one
                                       // value head has the key head for itself
  // Of one segment:
  AlignedBuffer<Real> rows;                // [kTokenRows, tokens, K]
  AlignedBuffer<Real> d_rows;              // their gradients
  AlignedBuffer<Real> values;              // [tokens, V]
  AlignedBuffer<Real> d_outputs;           // [tokens, V]
  AlignedBuffer<Real> d_values;            // [tokens, V]
  AlignedBuffer<Real> d_reads;             // [tokens, V]
  AlignedBuffer<Real> packed;              // [chunks, kRows, kRowStride]
  AlignedBuffer<Real> channels;            // [chunks, kChannelRows, kRowStride]
  AlignedBuffer<Real> state;               // panel-major [K, V]
  AlignedBuffer<Real> d_state;             // panel-major [K, V]
  AlignedBuffer<Real> d_state_transposed;  // [kPanel, K]: one panel
  AlignedBuffer<Real> states_transposed;   // [chunks, kPanel, K]: one panel
};

/// Walks a head forward: keeps the states before its segments, what its tokens do to each other,
/// and what they read.
template <class Rule, class Real>
void recompute_head(const RuleParams<Real>& call, const Head& head,
                    DplrBlock<Real, Rule::kCorrection>& block, TokenBlock<Real>& rows,
                    DplrBackwardScratch<Rule::kCorrection, Real>& s) {
  using Form = DplrForm<Rule, DplrEmit::kLowRank>;
  RuleParams<Real> params = call;
  params.o = {};  // what is recomputed goes nowhere
  const Shape& shape = params.shape;
  const std::int64_t length = head.sequence.length;
  const std::int64_t panel_size = shape.K * kPanel<Real>;
  s.pending.clear();
  for (std::int64_t segment = 0; segment < s.segments; ++segment) {
    const std::int64_t begin = segment * kBlock;
    const std::int64_t count = std::min(kBlock, length - begin);
    const std::int64_t chunks = divide_up(count, kChunk);
    std::copy_n(s.state.data(), s.state_size, s.checkpoints.data() + segment * s.state_size);
    std::copy_n(s.pending.log.data(), s.pending.channels,
                s.pending_logs.data() + segment * s.pending.channels);
    Form::pack(params, head, begin, count, /*settle=*/false, s.pending, block);
    std::copy_n(block.chunks, chunks, s.pairs.data() + segment * kChunksPerBlock);
    if (Rule::kCorrection == Correction::kNone && segment + 1 == s.segments) break;
    rows.load(params, head, begin, count);
    for (std::int64_t panel = 0; panel < s.value_panels(); ++panel) {
      const std::int64_t column = panel * kPanel<Real>;
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const std::int64_t token = chunk * kChunk;
        Real* out = s.low_rank.data() + (begin + token) * s.value_stride + column;
        Form::step(block, chunk, shape,
                   ChunkRows<Real>{rows.values + token * rows.value_stride + column,
                                   rows.value_stride, out, s.value_stride},
                   s.prefetch, s.state.data() + panel * panel_size, static_cast<Real*>(nullptr));
      }
    }
  }
}

/// Loads the rows of a segment; those missing in its last chunk change nothing.
template <class Rule, class Real>
void load_segment(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                  const Head& head, std::int64_t begin, std::int64_t count,
                  DplrBackwardScratch<Rule::kCorrection, Real>& s) {
  const std::int64_t keys = params.shape.K;
  for (std::int64_t i = 0; i < round_up(count, kChunk); ++i) {
    const auto x = s.of(s.rows, i);
    const std::int64_t at = i * s.value_stride;
    if (i >= count) {
      for (Real* row : {x.q, x.k, x.a, x.b, x.log_decay}) std::fill_n(row, keys, Real{0});
      std::fill_n(x.decay, keys, Real{1});
      std::fill_n(s.values.data() + at, s.value_stride, Real{0});
      std::fill_n(s.d_outputs.data() + at, s.value_stride, Real{0});
      continue;
    }
    const std::int64_t t = head.sequence.begin + begin + i;
    const auto batch = head.sequence.batch;
    Rule::load(params, head, t, x);
    if constexpr (Rule::kCorrection != Correction::kDelta) {
      load_row<Real>(params.v.at(batch, t, head.value_head), params.v.dtype, params.shape.V,
                     s.values.data() + at);
    }
    if (gradients.d_o) {
      load_row<Real>(gradients.d_o.at(batch, t, head.value_head), gradients.d_o.dtype,
                     params.shape.V, s.d_outputs.data() + at);
    }
  }
}

/// Calls `body(c)` for each vector of channels.
template <class Real, class Body>
HWY_INLINE void for_each_channel_vector(std::int64_t channels, const Body& body) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(Tag<Real>()));
  for (std::int64_t c = 0; c < channels; c += kLanes) body(c);
}

/// Decays the keys of a chunk to its end, as the stored state takes them.
template <Correction kCorrection, class Real>
HWY_NOINLINE void pack_state_rows(std::int64_t chunk, DplrBackwardScratch<kCorrection, Real>& s) {
  using Rows = DplrBackwardRows<kCorrection>;
  const Tag<Real> d;
  constexpr std::int64_t kStride = kRowStride<Real>;
  const auto x = s.of(s.rows, chunk * kChunk);
  const auto out = s.channel_rows(chunk);
  Real* keys = s.packed_row(chunk, Rows::kStateKeys);
  Real* second = s.packed_row(chunk, Rows::kStateSecondKeys);
  alignas(64) Real log_decays[kRowStride<Real>];
  for_each_channel_vector<Real>(s.pending.channels, [&](std::int64_t c) HWY_ATTR {
    auto sum = hn::Zero(d);
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
      sum = hn::Add(sum, hn::Load(d, x.log_decay + i * s.key_stride + c));
    }
    hn::Store(sum, d, log_decays + c);
  });
  std::copy_n(s.pending.scale.data(), s.pending.channels, out.state_scale);
  s.pending.take(log_decays, /*settle=*/false, out.state_factor);
  for_each_channel_vector<Real>(s.pending.channels, [&](std::int64_t c) HWY_ATTR {
    auto running = hn::Load(d, s.pending.inverse.data() + c);
#pragma GCC unroll 8
    for (int i = kChunk - 1; i >= 0; --i) {
      const std::int64_t at = i * s.key_stride + c;
      hn::Store(hn::Mul(running, hn::Load(d, x.k + at)), d, keys + i * kStride + c);
      if constexpr (Rows::kTwoWrites) {
        hn::Store(hn::Mul(running, hn::Load(d, x.b + at)), d, second + i * kStride + c);
      }
      running = hn::Mul(running, hn::Load(d, x.decay + at));
    }
  });
}

/// The same for what is stored of the gradient of the state, whose chunks come last to first.
template <Correction kCorrection, class Real>
HWY_NOINLINE void pack_gradient_rows(std::int64_t chunk, bool settle,
                                     DplrBackwardScratch<kCorrection, Real>& s) {
  using Rows = DplrBackwardRows<kCorrection>;
  const Tag<Real> d;
  constexpr std::int64_t kStride = kRowStride<Real>;
  const auto x = s.of(s.rows, chunk * kChunk);
  const auto out = s.channel_rows(chunk);
  Real* keys = s.packed_row(chunk, Rows::kKeys);
  Real* second = s.packed_row(chunk, Rows::kSecondKeys);
  Real* queries = s.packed_row(chunk, Rows::kQueries);
  Real* reads = s.packed_row(chunk, Rows::kReadKeys);
  alignas(64) Real log_decays[kRowStride<Real>];
  std::copy_n(s.d_pending.scale.data(), s.d_pending.channels, out.d_state_scale);
  for_each_channel_vector<Real>(s.d_pending.channels, [&](std::int64_t c) HWY_ATTR {
    auto running = hn::Load(d, out.d_state_scale + c);
    auto sum = hn::Zero(d);
#pragma GCC unroll 8
    for (int i = kChunk - 1; i >= 0; --i) {
      const std::int64_t at = i * s.key_stride + c;
      sum = hn::Add(sum, hn::Load(d, x.log_decay + at));
      hn::Store(hn::Mul(running, hn::Load(d, x.k + at)), d, keys + i * kStride + c);
      if constexpr (Rows::kTwoWrites) {
        hn::Store(hn::Mul(running, hn::Load(d, x.b + at)), d, second + i * kStride + c);
      }
      running = hn::Mul(running, hn::Load(d, x.decay + at));
    }
    hn::Store(sum, d, log_decays + c);
    hn::Store(hn::Mul(running, hn::Load(d, out.state_scale + c)), d, out.whole + c);
  });
  s.d_pending.take(log_decays, settle, out.d_state_factor);
  for_each_channel_vector<Real>(s.d_pending.channels, [&](std::int64_t c) HWY_ATTR {
    auto running = hn::Load(d, s.d_pending.inverse.data() + c);
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
      const std::int64_t at = i * s.key_stride + c;
      if constexpr (Rows::kReads) {
        hn::Store(hn::Mul(running, hn::Load(d, x.a + at)), d, reads + i * kStride + c);
      }
      running = hn::Mul(running, hn::Load(d, x.decay + at));
      hn::Store(hn::Mul(running, hn::Load(d, x.q + at)), d, queries + i * kStride + c);
    }
  });
}

/// A panel of a state, transposed: kPanel rows over the channels, themselves panel-major.
template <class Real>
Panels<Real> transposed_panel(Real* data) {
  return panel_major(data, kPanel<Real>);
}

template <class Real>
HWY_NOINLINE void transpose_panel(const Real* state, std::int64_t keys, Real* out) {
  for (std::int64_t r = 0; r < keys; r += kPanel<Real>) {
    transpose(state + r * kPanel<Real>, kPanel<Real>, std::min(kPanel<Real>, keys - r),
              kPanel<Real>, out + r * kPanel<Real>, kPanel<Real>);
  }
}

/// out ← state Diag(factors) + Σ_i w_i k_iᵀ on a transposed panel; w_i are columns of token rows.
/// Without `factors`, they are 1.
template <class Real>
HWY_INLINE void write_transposed(const Real* state, std::int64_t panels, const Real* factors,
                                 const Real* keys, const Real* writes, std::int64_t write_stride,
                                 Real* out) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t column = panel * kPanel<Real>;
    Vector<Real> k[kChunk][kPanelVectors], factor[kPanelVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      factor[j] =
          factors != nullptr ? hn::Load(d, factors + column + j * kLanes) : hn::Set(d, Real{1});
    }
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) {
        k[i][j] = hn::Load(d, keys + i * kRowStride<Real> + column + j * kLanes);
      }
    }
    for (std::int64_t v = 0; v < kPanel<Real>; ++v) {
      const std::int64_t at = (column + v) * kPanel<Real>;
      Vector<Real> row[kPanelVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) {
        row[j] = hn::Mul(factor[j], hn::Load(d, state + at + j * kLanes));
      }
#pragma GCC unroll 8
      for (int i = 0; i < kChunk; ++i) {
        const auto w = hn::Set(d, writes[i * write_stride + v]);
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVectors; ++j) row[j] = hn::MulAdd(w, k[i][j], row[j]);
      }
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) {
        hn::Store(row[j], d, out + at + j * kLanes);
      }
    }
  }
}

/// The stored states before each chunk of a segment, one panel of them, transposed.
template <Correction kCorrection, class Real>
HWY_NOINLINE void recompute_panel(std::int64_t segment, std::int64_t chunks, std::int64_t panel,
                                  DplrBackwardScratch<kCorrection, Real>& s) {
  using Rows = DplrBackwardRows<kCorrection>;
  const std::int64_t column = panel * kPanel<Real>;
  const Real* start = s.checkpoints.data() + segment * s.state_size + column * s.shape.K;
  transpose_panel(start, s.shape.K, s.state_transposed(0));
  const Real* written = s.written(segment * kBlock);
  const Real* read = s.read(segment * kBlock);
  for (std::int64_t chunk = 0; chunk + 1 < chunks; ++chunk) {
    const std::int64_t at = chunk * kChunk * s.value_stride + column;
    Real* next = s.state_transposed(chunk + 1);
    write_transposed(s.state_transposed(chunk), s.key_panels(), s.channel_rows(chunk).state_factor,
                     s.packed_row(chunk, Rows::kStateKeys), written + at, s.value_stride, next);
    if constexpr (Rows::kTwoWrites) {
      write_transposed(next, s.key_panels(), static_cast<const Real*>(nullptr),
                       s.packed_row(chunk, Rows::kStateSecondKeys), read + at, s.value_stride,
                       next);
    }
  }
}

/// Gradients of what is written and read by a chunk's tokens, on one panel: `writes` comes as
/// what k reads from the gradient of the state, `reads` as what b does.
template <Correction kCorrection, class Real>
HWY_INLINE void solve_gradients(const DplrChunk<Real, kCorrection>& c, const Real* d_outputs,
                                std::int64_t stride, Vector<Real> (&writes)[kChunk][kPanelVectors],
                                Vector<Real> (&reads)[kChunk][kPanelVectors]) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) {
    Vector<Real> d_output[kPanelVectors];
#pragma GCC unroll 2
    for (int p = 0; p < kPanelVectors; ++p) {
      d_output[p] = hn::Load(d, d_outputs + i * stride + p * kLanes);
    }
#pragma GCC unroll 8
    for (int j = 0; j <= i; ++j) {
      const auto qk = hn::Set(d, c.qk[i][j]);
#pragma GCC unroll 2
      for (int p = 0; p < kPanelVectors; ++p) {
        writes[j][p] = hn::MulAdd(qk, d_output[p], writes[j][p]);
        if constexpr (kCorrection == Correction::kGeneral) {
          reads[j][p] = hn::MulAdd(hn::Set(d, c.qb[i][j]), d_output[p], reads[j][p]);
        }
      }
    }
  }
  if constexpr (kCorrection != Correction::kNone) {
#pragma GCC unroll 8
    for (int i = kChunk - 1; i >= 0; --i) {
      if constexpr (kCorrection == Correction::kDelta) {
#pragma GCC unroll 2
        for (int p = 0; p < kPanelVectors; ++p) reads[i][p] = hn::Neg(writes[i][p]);
      }
#pragma GCC unroll 8
      for (int j = 0; j < i; ++j) {
        const auto ak = hn::Set(d, c.ak[i][j]);
#pragma GCC unroll 2
        for (int p = 0; p < kPanelVectors; ++p) {
          writes[j][p] = hn::MulAdd(ak, reads[i][p], writes[j][p]);
          if constexpr (kCorrection == Correction::kGeneral) {
            reads[j][p] = hn::MulAdd(hn::Set(d, c.ab[i][j]), reads[i][p], reads[j][p]);
          }
        }
      }
    }
  }
}

/// One chunk on one panel: the gradients of its values, the products of its rows with the states
/// around it, and the gradient of the state before it.
template <Correction kCorrection, class Real>
HWY_NOINLINE void differentiate_panel(std::int64_t segment, std::int64_t chunk, std::int64_t panel,
                                      DplrBackwardScratch<kCorrection, Real>& s) {
  using Rows = DplrBackwardRows<kCorrection>;
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  const std::int64_t keys = s.shape.K;
  const std::int64_t stride = s.value_stride;
  const std::int64_t column = panel * kPanel<Real>;
  const std::int64_t at = chunk * kChunk * stride + column;
  const auto channels = s.channel_rows(chunk);
  const auto d_x = s.of(s.d_rows, chunk * kChunk);
  const Real* d_outputs = s.d_outputs.data() + at;
  Real* d_state = s.d_state.data() + column * keys;

  Vector<Real> writes[kChunk][kPanelVectors], reads[kChunk][kPanelVectors];
  read_state(d_state, kPanel<Real>, s.packed_row(chunk, Rows::kKeys), keys, s.prefetch, writes);
  if constexpr (Rows::kTwoWrites) {
    read_state(d_state, kPanel<Real>, s.packed_row(chunk, Rows::kSecondKeys), keys, s.prefetch,
               reads);
  }
  solve_gradients<kCorrection>(s.pairs[static_cast<std::size_t>(segment * kChunksPerBlock + chunk)],
                               d_outputs, stride, writes, reads);
  Real* d_values = s.d_values.data() + at;
  Real* d_reads = s.d_reads.data() + at;
#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanelVectors; ++p) {
      hn::Store(writes[i][p], d, d_values + i * stride + p * kLanes);
      if constexpr (Rows::kTwoWrites) {
        hn::Store(reads[i][p], d, d_reads + i * stride + p * kLanes);
      }
    }
  }

  // The products with rows of values: each panel adds to those before it.
  const Real keep = panel == 0 ? Real{0} : Real{1};
  Real* transposed = s.d_state_transposed.data();
  transpose_panel(d_state, keys, transposed);
  const auto add = [&](const Real* left, Real* right, Real* out) HWY_ATTR {
    multiply<Real>(kChunk, kPanel<Real>, s.key_panels(), {left, stride, 1}, transposed_panel(right),
                   keep, row_major(out, s.key_stride));
  };
  add(s.written(segment * kBlock) + at, transposed, d_x.k);
  if constexpr (Rows::kTwoWrites) add(s.read(segment * kBlock) + at, transposed, d_x.b);
  Real* state = s.state_transposed(chunk);
  add(d_outputs, state, d_x.q);
  if constexpr (Rows::kReads) add(Rows::kTwoWrites ? d_reads : d_values, state, d_x.a);
  for_each_channel_vector<Real>(s.pending.channels, [&](std::int64_t c) HWY_ATTR {
    auto sum = panel == 0 ? hn::Zero(d) : hn::Load(d, channels.kept + c);
    const std::int64_t first = c / kPanel<Real> * kPanel<Real> * kPanel<Real> + c % kPanel<Real>;
    for (std::int64_t v = 0; v < kPanel<Real>; ++v) {
      const std::int64_t offset = first + v * kPanel<Real>;
      sum = hn::MulAdd(hn::Load(d, transposed + offset), hn::Load(d, state + offset), sum);
    }
    hn::Store(sum, d, channels.kept + c);
  });

  const Real* factors = channels.d_state_factor;
  const auto decay = [factors, d](std::int64_t r, Vector<Real> row)
                         HWY_ATTR { return hn::Mul(hn::Set(d, factors[r]), row); };
  const auto unchanged = [](std::int64_t, Vector<Real> row) HWY_ATTR { return row; };
  if constexpr (Rows::kReads) {
    write_state(d_state, kPanel<Real>, s.packed_row(chunk, Rows::kReadKeys), keys, decay, reads);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanelVectors; ++p) {
      writes[i][p] = hn::Load(d, d_outputs + i * stride + p * kLanes);
    }
  }
  const Real* queries = s.packed_row(chunk, Rows::kQueries);
  if constexpr (Rows::kReads) {
    write_state(d_state, kPanel<Real>, queries, keys, unchanged, writes);
  } else {
    write_state(d_state, kPanel<Real>, queries, keys, decay, writes);
  }
}

/// Gradients of the decayed products of a chunk's rows, as `DplrChunk` has the products.
template <class Real>
struct PairGradients {
  Real ak[kChunk][kChunk];
  Real ab[kChunk][kChunk];
  Real qk[kChunk][kChunk];
  Real qb[kChunk][kChunk];
};

/// with_a[i] = reads_i · written_j for i > j, with_q[i] = outputs_i · written_j for i ≥ j.
template <bool kReads, int kFirst, class Real>
HWY_INLINE void multiply_values(const Real* outputs, const Real* reads, const Real* written,
                                std::int64_t stride, Real (&with_a)[kChunk][kChunk],
                                Real (&with_q)[kChunk][kChunk]) {
  const Tag<Real> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  Vector<Real> sums[2 * kChunk];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kChunk; ++i) sums[i] = hn::Zero(d);
  for (std::int64_t c = 0; c < stride; c += kLanes) {
    const auto w = hn::Load(d, written + kFirst * stride + c);
#pragma GCC unroll 8
    for (int i = kFirst; i < kChunk; ++i) {
      const std::int64_t at = i * stride + c;
      sums[kChunk + i] = hn::MulAdd(hn::Load(d, outputs + at), w, sums[kChunk + i]);
      if constexpr (kReads) {
        if (i > kFirst) sums[i] = hn::MulAdd(hn::Load(d, reads + at), w, sums[i]);
      }
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
HWY_NOINLINE void multiply_all_values(const Real* outputs, const Real* reads, const Real* written,
                                      std::int64_t stride, Real (&with_a)[kChunk][kChunk],
                                      Real (&with_q)[kChunk][kChunk]) {
  const auto columns = [&]<int... kColumn>(std::integer_sequence<int, kColumn...>) HWY_ATTR {
    (multiply_values<kReads, kColumn>(outputs, reads, written, stride, with_a, with_q), ...);
  };
  columns(std::make_integer_sequence<int, kChunk>());
}

/// What the pairs of written row j say on one vector of channels: its gradient is returned; those
/// of a, q and g are added to.
template <bool kReads, int kFirst, class Real>
HWY_INLINE Vector<Real> differentiate_written(const Real (&ak)[kChunk][kChunk],
                                              const Real (&qk)[kChunk][kChunk],
                                              const TokenRows<Real>& x, std::int64_t stride,
                                              Vector<Real> row, Vector<Real> (&d_a)[kChunk],
                                              Vector<Real> (&d_q)[kChunk],
                                              Vector<Real> (&d_g)[kChunk]) {
  const Tag<Real> d;
  Vector<Real> decayed[kChunk];  // Γ(j, i] w
  decayed[kFirst] = row;
#pragma GCC unroll 8
  for (int i = kFirst + 1; i < kChunk; ++i) {
    decayed[i] = hn::Mul(hn::Load(d, x.decay + i * stride), decayed[i - 1]);
  }
  auto gradient = hn::Zero(d);  // of decayed[i]
#pragma GCC unroll 8
  for (int i = kChunk - 1; i >= kFirst; --i) {
    const auto with_q = hn::Set(d, qk[i][kFirst]);
    gradient = hn::MulAdd(with_q, hn::Load(d, x.q + i * stride), gradient);
    d_q[i] = hn::MulAdd(with_q, decayed[i], d_q[i]);
    if (i == kFirst) break;
    d_g[i] = hn::MulAdd(gradient, decayed[i], d_g[i]);
    gradient = hn::Mul(hn::Load(d, x.decay + i * stride), gradient);
    if constexpr (kReads) {
      const auto with_a = hn::Set(d, ak[i][kFirst]);
      gradient = hn::MulAdd(with_a, hn::Load(d, x.a + i * stride), gradient);
      d_a[i] = hn::MulAdd(with_a, decayed[i - 1], d_a[i]);
    }
  }
  return gradient;
}

/// Brings together the gradients of a chunk's rows: what the products with states say, already in
/// `d_rows`, and what the pairs do.
template <Correction kCorrection, class Real>
HWY_NOINLINE void finish_rows(std::int64_t segment, std::int64_t chunk,
                              DplrBackwardScratch<kCorrection, Real>& s) {
  using Rows = DplrBackwardRows<kCorrection>;
  const Tag<Real> d;
  const std::int64_t stride = s.key_stride;
  const std::int64_t at = chunk * kChunk * s.value_stride;
  PairGradients<Real> pairs;
  const Real* d_outputs = s.d_outputs.data() + at;
  const Real* d_reads = (Rows::kTwoWrites ? s.d_reads : s.d_values).data() + at;
  multiply_all_values<Rows::kReads>(d_outputs, d_reads, s.written(segment * kBlock) + at,
                                    s.value_stride, pairs.ak, pairs.qk);
  if constexpr (kCorrection == Correction::kDelta) {  // d_reads are −d_values
    for (auto& row : pairs.ak) {
      for (Real& value : row) value = -value;
    }
  }
  if constexpr (Rows::kTwoWrites) {
    multiply_all_values<true>(d_outputs, d_reads, s.read(segment * kBlock) + at, s.value_stride,
                              pairs.ab, pairs.qb);
  }
  const auto first = s.of(s.rows, chunk * kChunk);
  const auto d_first = s.of(s.d_rows, chunk * kChunk);
  const auto channels = s.channel_rows(chunk);
  for_each_channel_vector<Real>(s.pending.channels, [&](std::int64_t c) HWY_ATTR {
    const TokenRows<Real> x{first.q + c, first.k + c,     first.a + c,
                            first.b + c, first.decay + c, first.log_decay + c};
    const auto row = [stride, d](const Real* rows, int i)
                         HWY_ATTR { return hn::Load(d, rows + i * stride); };
    Vector<Real> d_q[kChunk], d_k[kChunk], d_a[kChunk], d_b[kChunk], d_g[kChunk];
    // Token t decays the state that passes through, every read at i ≥ t, every write of j < t.
    const auto passing = hn::Mul(hn::Load(d, channels.whole + c), hn::Load(d, channels.kept + c));
    auto decay = hn::Load(d, channels.state_scale + c);
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
      d_a[i] = hn::Zero(d);
      if constexpr (Rows::kReads) {
        const auto signed_decay = kCorrection == Correction::kDelta ? hn::Neg(decay) : decay;
        d_a[i] = hn::Mul(signed_decay, row(d_first.a + c, i));
      }
      decay = hn::Mul(decay, row(x.decay, i));
      d_q[i] = hn::Mul(decay, row(d_first.q + c, i));
    }
    decay = hn::Load(d, channels.d_state_scale + c);
#pragma GCC unroll 8
    for (int i = kChunk - 1; i >= 0; --i) {
      d_k[i] = hn::Mul(decay, row(d_first.k + c, i));
      d_b[i] = Rows::kTwoWrites ? hn::Mul(decay, row(d_first.b + c, i)) : hn::Zero(d);
      decay = hn::Mul(decay, row(x.decay, i));
    }
    auto reads = passing;
#pragma GCC unroll 8
    for (int i = kChunk - 1; i >= 0; --i) {
      reads = hn::MulAdd(row(x.q, i), d_q[i], reads);
      d_g[i] = reads;
      if constexpr (Rows::kReads) reads = hn::MulAdd(row(x.a, i), d_a[i], reads);
    }
    auto writes = hn::Zero(d);
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
      d_g[i] = hn::Add(d_g[i], writes);
      writes = hn::MulAdd(row(x.k, i), d_k[i], writes);
      if constexpr (Rows::kTwoWrites) writes = hn::MulAdd(row(x.b, i), d_b[i], writes);
    }
    const auto written = [&]<int... kFirst>(std::integer_sequence<int, kFirst...>) HWY_ATTR {
      ((d_k[kFirst] = hn::Add(d_k[kFirst],
                              differentiate_written<Rows::kReads, kFirst>(
                                  pairs.ak, pairs.qk, x, stride, row(x.k, kFirst), d_a, d_q, d_g))),
       ...);
      if constexpr (Rows::kTwoWrites) {
        ((d_b[kFirst] = hn::Add(
              d_b[kFirst], differentiate_written<true, kFirst>(pairs.ab, pairs.qb, x, stride,
                                                               row(x.b, kFirst), d_a, d_q, d_g))),
         ...);
      }
    };
    written(std::make_integer_sequence<int, kChunk>());
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
      const std::int64_t offset = i * stride + c;
      hn::Store(d_q[i], d, d_first.q + offset);
      hn::Store(d_k[i], d, d_first.k + offset);
      hn::Store(d_g[i], d, d_first.log_decay + offset);
      if constexpr (Rows::kReads) hn::Store(d_a[i], d, d_first.a + offset);
      if constexpr (Rows::kTwoWrites) hn::Store(d_b[i], d, d_first.b + offset);
    }
  });
}

/// The gradient of g: per channel, or their sum.
template <class Real>
void store_log_decay_gradient(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                              const Head& head, std::int64_t token, const Real* d_log_decay) {
  if (!gradients.d_g) return;
  const std::int64_t keys = params.shape.K;
  if (params.channel_gate) {
    store_row(d_log_decay, keys, gradients.d_g.at(head.sequence.batch, token, head.value_head),
              gradients.d_g.dtype);
  } else {
    double sum = 0;
    for (std::int64_t c = 0; c < keys; ++c) sum += static_cast<double>(d_log_decay[c]);
    store_gate_gradient(gradients.d_g, head, token, static_cast<Real>(sum));
  }
}

/// Hands the gradients of a segment's rows to the rule and stores what is complete.
template <class Rule, class Real>
void store_segment_gradients(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                             const Head& head, std::int64_t begin, std::int64_t count,
                             bool first_head, bool last_head,
                             DplrBackwardScratch<Rule::kCorrection, Real>& s) {
  const auto scale = static_cast<Real>(params.scale);
  const std::int64_t keys = params.shape.K;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t t = head.sequence.begin + begin + i;
    const auto sum = s.sum(begin + i, i);
    if (first_head) {
      for (Real* row : {sum.q, sum.k, sum.a, sum.b}) std::fill_n(row, keys, Real{0});
    }
    const auto d_x = s.of(s.d_rows, i);
    store_row(s.d_values.data() + i * s.value_stride, params.shape.V,
              gradients.d_v.at(head.sequence.batch, t, head.value_head), gradients.d_v.dtype);
    add_scaled_row(d_x.q, scale, keys, sum.q);
    Rule::differentiate(params, gradients, head, t, s.of(s.rows, i), d_x, sum);
    if (!last_head) continue;
    differentiate_norm(params, params.q, head, t, sum.q);
    differentiate_norm(params, params.k, head, t, sum.k);
    store_key_gradient(gradients.d_q, head, t, keys, sum.q);
    store_key_gradient(gradients.d_k, head, t, keys, sum.k);
    store_key_gradient(gradients.d_a, head, t, keys, sum.a);
    store_key_gradient(gradients.d_b, head, t, keys, sum.b);
  }
}

/// Gradients of one segment of a head: `d_state` goes from its end to its start.
template <class Rule, class Real>
void differentiate_segment(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                           const Head& head, std::int64_t segment,
                           DplrBackwardScratch<Rule::kCorrection, Real>& s) {
  const std::int64_t begin = segment * kBlock;
  const std::int64_t count = std::min(kBlock, head.sequence.length - begin);
  const std::int64_t chunks = divide_up(count, kChunk);
  load_segment<Rule>(params, gradients, head, begin, count, s);
  s.pending.restore(s.pending_logs.data() + segment * s.pending.channels);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) pack_state_rows(chunk, s);
  for (std::int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    pack_gradient_rows(chunk, segment == 0 && chunk == 0, s);
  }
  for (std::int64_t panel = 0; panel < s.value_panels(); ++panel) {
    recompute_panel(segment, chunks, panel, s);
    for (std::int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      differentiate_panel(segment, chunk, panel, s);
    }
  }
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) finish_rows(segment, chunk, s);
}

/// The value heads that read one key head of one sequence.
template <class Rule, class Real>
void dplr_backward_key_head(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                            std::int64_t n, std::int64_t key_head) {
  const Shape& shape = params.shape;
  const std::int64_t tokens = params.sequence(n).length;
  const std::int64_t group = params.value_heads_per_key_head();
  DplrBackwardScratch<Rule::kCorrection, Real> s(params, tokens);
  DplrBlock<Real, Rule::kCorrection> block(shape);
  TokenBlock<Real> rows(shape);
  for (std::int64_t member = 0; member < group; ++member) {
    const Head head = head_of(params, n, key_head * group + member);
    const std::int64_t offset = params.state_offset(n, head.value_head);
    load_state(params.initial_state ? params.initial_state + offset : nullptr, shape, 0,
               s.value_panels(), s.state.data());
    recompute_head<Rule>(params, head, block, rows, s);
    load_state(gradients.d_final_state ? gradients.d_final_state + offset : nullptr, shape, 0,
               s.value_panels(), s.d_state.data());
    s.d_pending.clear();
    for (std::int64_t segment = s.segments - 1; segment >= 0; --segment) {
      const std::int64_t begin = segment * kBlock;
      differentiate_segment<Rule>(params, gradients, head, segment, s);
      store_segment_gradients<Rule>(params, gradients, head, begin,
                                    std::min(kBlock, tokens - begin), member == 0,
                                    member + 1 == group, s);
    }
    if (gradients.d_initial_state != nullptr) {
      store_state(s.d_state.data(), shape, 0, s.value_panels(), gradients.d_initial_state + offset);
    }
  }
}

/// Gradients of `Rule`, in parallel over sequences and key heads.
template <class Rule, class Real>
void dplr_backward(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                   const Executor& executor) {
  executor.run(params.sequences() * params.shape.H, [&](std::int64_t task) {
    dplr_backward_key_head<Rule>(params, gradients, task / params.shape.H, task % params.shape.H);
  });
}

/// The three forms of `Rule`, compiled for the target at hand.
template <class Rule, class Real>
RuleForms<Real> dplr_forms() {
  return {&dplr_forward<Rule, Real>, &dplr_recurrent<Rule, Real>, &dplr_backward<Rule, Real>};
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
