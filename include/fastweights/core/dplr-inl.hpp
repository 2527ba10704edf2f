// Rules whose step is diagonal plus low rank: S ← Diag(α) S + b (Sᵀa)ᵀ + k vᵀ, o = Sᵀq. A rule says
// how its inputs become the rows q, k, a, b, α of a token; this file walks them, forward.
// Per-target include guard.
#if defined(FASTWEIGHTS_CORE_DPLR_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_DPLR_INL_HPP_
#undef FASTWEIGHTS_CORE_DPLR_INL_HPP_
#else
#define FASTWEIGHTS_CORE_DPLR_INL_HPP_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/chunkwise-inl.hpp"
#include "fastweights/core/matrix-inl.hpp"
#include "fastweights/core/rows-inl.hpp"
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
  Real* decay;
};

/// out ← exp(in). −∞ becomes an exact zero, NaN stays NaN.
template <class Real>
void exp_row(const Real* in, std::int64_t size, Real* out) {
  const Tag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    const auto x = hn::LoadU(d, in + i);
    hn::StoreU(hn::IfThenElse(hn::Eq(x, x), hn::Exp(d, x), x), d, out + i);
  }
  for (; i < size; ++i) out[i] = std::exp(in[i]);
}

/// out ← a ⊙ b (out may be either).
template <class Real>
void multiply_rows(const Real* a, const Real* b, std::int64_t size, Real* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = a[i] * b[i];
}

template <class Real>
Head head_of(const RuleParams<Real>& params, std::int64_t n, std::int64_t value_head) {
  return {params.sequence(n), value_head / params.value_heads_per_key_head(), value_head};
}

/// The decay factors of a token's channels: exp(g), 1 without a gate.
template <class Real>
void load_decay_row(const RuleParams<Real>& params, const Head& head, std::int64_t token,
                    Real* out) {
  const std::int64_t keys = params.shape.K;
  if (!params.channel_gate) {
    std::fill_n(out, keys, decay_of<Real>(params, head, token));
    return;
  }
  load_row<Real>(params.g.at(head.sequence.batch, token, head.value_head), params.g.dtype, keys,
                 out);
  exp_row(out, keys, out);
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

template <class Real>
Real load_gate(const ConstView& view, const Head& head, std::int64_t token) {
  return load_scalar<Real>(view.at(head.sequence.batch, token, head.value_head), view.dtype);
}

// ---- chunkwise ---------------------------------------------------------------------------------

/// What the tokens of one chunk do to each other, and the columns of one packed row.
template <class Real, Correction kCorrection>
struct DplrChunk {
  static constexpr bool kReads = kCorrection != Correction::kNone;
  static constexpr bool kTwoWrites = kCorrection == Correction::kGeneral;
  static constexpr int kQueries = kReads ? kChunk : 0;  // first column of the queries; reads are 0
  static constexpr int kKeys = kQueries + kChunk;
  static constexpr int kSecondKeys = kKeys + kChunk;
  static constexpr int kColumns = kSecondKeys + (kTwoWrites ? kChunk : 0);

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
      : key_stride(round_up(shape.K, kPanel<Real>)),
        value_stride(round_up(shape.V, kPanel<Real>)),
        rows(size(5 * kChunk * key_stride)),
        decayed(size(Chunk::kColumns * key_stride)),
        running(size(key_stride)),
        features(size(kChunksPerBlock * key_stride * Chunk::kColumns)),
        decay(size(kChunksPerBlock * key_stride)),
        values(size(kBlock * value_stride)),
        outputs(size(kBlock * value_stride)) {
    std::fill_n(rows.data(), 5 * kChunk * key_stride, Real{0});
    std::fill_n(decayed.data(), Chunk::kColumns * key_stride, Real{0});
  }

  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

  TokenRows<Real> token_rows(int i) {
    Real* first = rows.data() + i * key_stride;
    const std::int64_t step = kChunk * key_stride;
    return {first, first + step, first + 2 * step, first + 3 * step, first + 4 * step};
  }
  Real* decayed_row(int column) { return decayed.data() + column * key_stride; }
  Real* packed(std::int64_t chunk) {
    return features.data() + chunk * key_stride * Chunk::kColumns;
  }
  Real* chunk_decay(std::int64_t chunk) { return decay.data() + chunk * key_stride; }

  std::int64_t key_stride;
  std::int64_t value_stride;
  AlignedBuffer<Real> rows;      // [q k a b decay, C, key_stride]: the chunk being packed
  AlignedBuffer<Real> decayed;   // [columns, key_stride]
  AlignedBuffer<Real> running;   // [key_stride]
  AlignedBuffer<Real> features;  // [chunks, key_stride, columns]
  AlignedBuffer<Real> decay;     // [chunks, key_stride]: γ_C
  AlignedBuffer<Real> values;    // [kBlock, value_stride]
  AlignedBuffer<Real> outputs;   // [kBlock, value_stride]
  Chunk chunks[kChunksPerBlock];
};

/// Products of written row j with the reading rows of the tokens from j on:
/// with_a[i] = a_i · Γ(j, i−1] w for i > j, with_q[i] = q_i · Γ(j, i] w for i ≥ j. `stride` parts
/// the rows of successive tokens.
template <bool kReads, class Real>
HWY_NOINLINE void multiply_decayed(const TokenRows<Real>& first, std::int64_t stride,
                                   const Real* written, int j, std::int64_t keys,
                                   Real* HWY_RESTRICT with_a, Real* HWY_RESTRICT with_q) {
  const Tag<Real> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  hn::Vec<decltype(d)> a_sum[kChunk];
  hn::Vec<decltype(d)> q_sum[kChunk];
#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) a_sum[i] = q_sum[i] = hn::Zero(d);
  for (std::int64_t c = 0; c < keys; c += kLanes) {  // rows are padded with zeros
    auto w = hn::Load(d, written + c);
    const std::int64_t at = j * stride + c;
    q_sum[0] = hn::MulAdd(hn::Load(d, first.q + at), w, q_sum[0]);
    for (int i = 1; i < kChunk - j; ++i) {
      const std::int64_t later = at + i * stride;
      if constexpr (kReads) a_sum[i] = hn::MulAdd(hn::Load(d, first.a + later), w, a_sum[i]);
      w = hn::Mul(w, hn::Load(d, first.decay + later));
      q_sum[i] = hn::MulAdd(hn::Load(d, first.q + later), w, q_sum[i]);
    }
  }
  for (int i = 0; i < kChunk - j; ++i) {
    with_q[j + i] = hn::GetLane(hn::SumOfLanes(d, q_sum[i]));
    if constexpr (kReads) with_a[j + i] = hn::GetLane(hn::SumOfLanes(d, a_sum[i]));
  }
}

/// Decays the rows of a loaded chunk to its start or end and packs them by channel.
template <class Real, Correction kCorrection>
void pack_chunk(DplrBlock<Real, kCorrection>& block, std::int64_t chunk, std::int64_t keys) {
  using Chunk = DplrChunk<Real, kCorrection>;
  Real* running = block.running.data();
  std::fill_n(running, keys, Real{1});
  for (int i = 0; i < kChunk; ++i) {
    const auto x = block.token_rows(i);
    if constexpr (Chunk::kReads) multiply_rows(x.a, running, keys, block.decayed_row(i));
    multiply_rows(running, x.decay, keys, running);
    multiply_rows(x.q, running, keys, block.decayed_row(Chunk::kQueries + i));
  }
  std::copy_n(running, keys, block.chunk_decay(chunk));
  std::fill_n(running, keys, Real{1});
  for (int i = kChunk - 1; i >= 0; --i) {
    const auto x = block.token_rows(i);
    multiply_rows(x.k, running, keys, block.decayed_row(Chunk::kKeys + i));
    if constexpr (Chunk::kTwoWrites) {
      multiply_rows(x.b, running, keys, block.decayed_row(Chunk::kSecondKeys + i));
    }
    multiply_rows(running, x.decay, keys, running);
  }
  transpose(block.decayed.data(), block.key_stride, Chunk::kColumns, keys, block.packed(chunk),
            Chunk::kColumns);

  const auto first = block.token_rows(0);
  auto& out = block.chunks[chunk];
  for (int j = 0; j < kChunk; ++j) {
    Real with_a[kChunk] = {};
    Real with_q[kChunk] = {};
    const auto x = block.token_rows(j);
    multiply_decayed<Chunk::kReads>(first, block.key_stride, x.k, j, keys, with_a, with_q);
    for (int i = j; i < kChunk; ++i) {
      out.ak[i][j] = with_a[i];
      out.qk[i][j] = with_q[i];
    }
    if constexpr (Chunk::kTwoWrites) {
      multiply_decayed<true>(first, block.key_stride, x.b, j, keys, with_a, with_q);
      for (int i = j; i < kChunk; ++i) {
        out.ab[i][j] = with_a[i];
        out.qb[i][j] = with_q[i];
      }
    }
  }
}

/// Packs tokens [begin, begin + count) of a head. Missing tokens of the last chunk write nothing
/// and do not decay.
template <class Rule, class Real>
void pack_block(const RuleParams<Real>& params, const Head& head, std::int64_t begin,
                std::int64_t count, DplrBlock<Real, Rule::kCorrection>& block) {
  const std::int64_t keys = params.shape.K;
  for (std::int64_t chunk = 0; chunk * kChunk < count; ++chunk) {
    for (int i = 0; i < kChunk; ++i) {
      const std::int64_t token = chunk * kChunk + i;
      const auto x = block.token_rows(i);
      Real* value = block.values.data() + token * block.value_stride;
      if (token < count) {
        const std::int64_t t = head.sequence.begin + begin + token;
        Rule::load(params, head, t, x);
        load_padded_row(params.v, head.sequence.batch, t, head.value_head, params.shape.V,
                        block.value_stride, value);
      } else {
        for (Real* row : {x.q, x.k, x.a, x.b}) std::fill_n(row, keys, Real{0});
        std::fill_n(x.decay, keys, Real{1});
        std::fill_n(value, block.value_stride, Real{0});
      }
    }
    pack_chunk(block, chunk, keys);
  }
}

/// S ← Diag(decay) S + Σ_i k_i w_iᵀ over the C packed rows; a null `decay` keeps S.
template <int kColumns, class Real>
HWY_INLINE void write_rows(Real* HWY_RESTRICT state, const Real* HWY_RESTRICT features,
                           std::int64_t keys, const Real* HWY_RESTRICT decay,
                           const Vector<Real> (&writes)[kChunk][kPanelVectors]) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  Vector<Real> w[kChunk][kPanelVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) w[i][j] = writes[i][j];
  }
  for (std::int64_t r = 0; r < keys; ++r, state += kPanel<Real>, features += kColumns) {
    Vector<Real> row[kPanelVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      row[j] = hn::Load(d, state + j * kLanes);
      if (decay != nullptr) row[j] = hn::Mul(hn::Set(d, decay[r]), row[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
      const auto x = hn::Set(d, features[i]);
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) row[j] = hn::MulAdd(x, w[i][j], row[j]);
    }
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) hn::Store(row[j], d, state + j * kLanes);
  }
}

/// One chunk on one panel of the state; `values` and `outputs` point at the panel's first column.
template <class Real, Correction kCorrection>
HWY_INLINE void step_dplr_chunk(const DplrChunk<Real, kCorrection>& c, const Real* packed,
                                const Real* decay, std::int64_t keys, const Real* values,
                                std::int64_t value_stride, Real* state, Real* outputs) {
  using Chunk = DplrChunk<Real, kCorrection>;
  constexpr int kColumns = Chunk::kColumns;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  const Tag<Real> d;
  const auto value = [&](int i, int j)
                         HWY_ATTR { return hn::Load(d, values + i * value_stride + j * kLanes); };
  Vector<Real> writes[kChunk][kPanelVectors];  // of the keys k
  Vector<Real> reads[kChunk][kPanelVectors];   // Sᵀa, then what b writes
  Vector<Real> queried[kChunk][kPanelVectors];
  if constexpr (Chunk::kReads) read_state<kColumns>(state, packed, keys, reads);
  read_state<kColumns>(state, packed + Chunk::kQueries, keys, queried);

  for (int i = 0; i < kChunk; ++i) {
    for (int j = 0; j < kPanelVectors; ++j) {
      if constexpr (kCorrection == Correction::kNone) {
        writes[i][j] = value(i, j);
      } else if constexpr (kCorrection == Correction::kDelta) {
        auto error = hn::Sub(value(i, j), reads[i][j]);
        for (int before = 0; before < i; ++before) {
          error = hn::NegMulAdd(hn::Set(d, c.ak[i][before]), writes[before][j], error);
        }
        writes[i][j] = error;
      } else {
        writes[i][j] = value(i, j);
        auto read = reads[i][j];
        for (int before = 0; before < i; ++before) {
          read = hn::MulAdd(hn::Set(d, c.ab[i][before]), reads[before][j], read);
          read = hn::MulAdd(hn::Set(d, c.ak[i][before]), writes[before][j], read);
        }
        reads[i][j] = read;
      }
    }
  }
  for (int i = 0; i < kChunk; ++i) {
    for (int j = 0; j < kPanelVectors; ++j) {
      auto output = queried[i][j];
      for (int before = 0; before <= i; ++before) {
        output = hn::MulAdd(hn::Set(d, c.qk[i][before]), writes[before][j], output);
        if constexpr (Chunk::kTwoWrites) {
          output = hn::MulAdd(hn::Set(d, c.qb[i][before]), reads[before][j], output);
        }
      }
      hn::Store(output, d, outputs + i * value_stride + j * kLanes);
    }
  }
  write_rows<kColumns>(state, packed + Chunk::kKeys, keys, decay, writes);
  if constexpr (Chunk::kTwoWrites) {
    write_rows<kColumns, Real>(state, packed + Chunk::kSecondKeys, keys, nullptr, reads);
  }
}

/// Runs `panels` panels of one head over its whole sequence.
template <class Rule, class Real>
void dplr_forward_head(const RuleParams<Real>& params, std::int64_t n, std::int64_t value_head,
                       std::int64_t first_panel, std::int64_t panels) {
  const Shape& shape = params.shape;
  const Head head = head_of(params, n, value_head);
  const std::int64_t offset = params.state_offset(n, value_head);
  const std::int64_t first_column = first_panel * kPanel<Real>;
  const std::int64_t columns = std::min(panels * kPanel<Real>, shape.V - first_column);

  AlignedBuffer<Real> state(static_cast<std::size_t>(panels * shape.K * kPanel<Real>));
  const Real* initial = params.initial_state ? params.initial_state + offset : nullptr;
  load_state(initial, shape, first_panel, panels, state.data());
  DplrBlock<Real, Rule::kCorrection> block(shape);
  for (std::int64_t begin = 0; begin < head.sequence.length; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, head.sequence.length - begin);
    pack_block<Rule>(params, head, begin, count, block);
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      Real* panel_state = state.data() + panel * shape.K * kPanel<Real>;
      const std::int64_t column = first_column + panel * kPanel<Real>;
      for (std::int64_t chunk = 0; chunk * kChunk < count; ++chunk) {
        const std::int64_t row = chunk * kChunk * block.value_stride + column;
        step_dplr_chunk(block.chunks[chunk], block.packed(chunk), block.chunk_decay(chunk), shape.K,
                        block.values.data() + row, block.value_stride, panel_state,
                        block.outputs.data() + row);
      }
    }
    store_outputs(params.o, head, begin, count, block.outputs.data(), block.value_stride,
                  first_column, columns);
  }
  if (params.final_state != nullptr) {
    store_state(state.data(), shape, first_panel, panels, params.final_state + offset);
  }
}

/// The chunkwise form of `Rule`.
template <class Rule, class Real>
void dplr_forward(const RuleParams<Real>& params, const Executor& executor) {
  for_each_column_slice<Real>(params, executor, [&](auto n, auto head, auto first, auto panels) {
    dplr_forward_head<Rule>(params, n, head, first, panels);
  });
}

// ---- recurrent ---------------------------------------------------------------------------------

/// One token on `kVectors` vectors of columns, in place.
template <Correction kCorrection, int kVectors, class D, class Real>
HWY_INLINE void step_dplr_columns(D d, const TokenRows<Real>& x, std::int64_t keys,
                                  std::int64_t values, const Real* HWY_RESTRICT v,
                                  Real* HWY_RESTRICT state, Real* HWY_RESTRICT out) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<D> read[kVectors], write[kVectors], output[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    read[j] = output[j] = hn::Zero(d);
    write[j] = hn::LoadU(d, v + j * lanes);
  }
  if constexpr (kCorrection != Correction::kNone) {
    const Real* row = state;
    for (std::int64_t r = 0; r < keys; ++r, row += values) {
      const auto a = hn::Set(d, x.a[r]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        read[j] = hn::MulAdd(a, hn::LoadU(d, row + j * lanes), read[j]);
      }
    }
  }
  if constexpr (kCorrection == Correction::kDelta) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) write[j] = hn::Sub(write[j], read[j]);
  }
  Real* row = state;
  for (std::int64_t r = 0; r < keys; ++r, row += values) {
    const auto decay = hn::Set(d, x.decay[r]);
    const auto k = hn::Set(d, x.k[r]);
    const auto q = hn::Set(d, x.q[r]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      auto s = hn::Mul(decay, hn::LoadU(d, row + j * lanes));
      s = hn::MulAdd(k, write[j], s);
      if constexpr (kCorrection == Correction::kGeneral) {
        s = hn::MulAdd(hn::Set(d, x.b[r]), read[j], s);
      }
      output[j] = hn::MulAdd(q, s, output[j]);
      hn::StoreU(s, d, row + j * lanes);
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

/// Copies one head's initial state to where it is worked on.
template <class Real>
Real* working_state(const Real* initial, Real* working, std::int64_t offset, const Shape& shape) {
  Real* state = working + offset;
  if (initial == nullptr) {
    std::fill_n(state, shape.K * shape.V, Real{0});
  } else if (initial != working) {
    std::copy_n(initial + offset, shape.K * shape.V, state);
  }
  return state;
}

template <class Rule, class Real>
void dplr_recurrent_head(const RuleParams<Real>& params, std::int64_t n, std::int64_t value_head) {
  const Shape& shape = params.shape;
  const Head head = head_of(params, n, value_head);
  Real* state = working_state(params.initial_state, params.final_state,
                              params.state_offset(n, value_head), shape);
  alignas(64) Real rows[5][kMaxHeadSize];
  alignas(64) Real v[kMaxHeadSize];
  alignas(64) Real out[kMaxHeadSize];
  const TokenRows<Real> x{rows[0], rows[1], rows[2], rows[3], rows[4]};
  for (std::int64_t i = 0; i < head.sequence.length; ++i) {
    const std::int64_t t = head.sequence.begin + i;
    Rule::load(params, head, t, x);
    load_row<Real>(params.v.at(head.sequence.batch, t, value_head), params.v.dtype, shape.V, v);
    for_each_column_block<Real>(shape.V, [&](auto d, auto vectors, std::int64_t c) HWY_ATTR {
      step_dplr_columns<Rule::kCorrection, decltype(vectors)::value>(d, x, shape.K, shape.V, v + c,
                                                                     state + c, out + c);
    });
    store_row(out, shape.V, params.o.at(head.sequence.batch, t, value_head), params.o.dtype);
  }
}

/// The recurrent form of `Rule`. `params.final_state` must not be null.
template <class Rule, class Real>
void dplr_recurrent(const RuleParams<Real>& params, const Executor& executor) {
  executor.run(params.sequences() * params.shape.HV, [&](std::int64_t task) {
    dplr_recurrent_head<Rule>(params, task / params.shape.HV, task % params.shape.HV);
  });
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
