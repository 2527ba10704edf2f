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
#include <cstddef>
#include <cstdint>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/executor.hpp"
#include "fastweights/core/matrix-inl.hpp"
#include "fastweights/core/rows-inl.hpp"
#include "fastweights/core/rule.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// Tokens of one chunk. Small: every token in a chunk costs a column of triangular work, and eight
/// are enough to read the state once for many multiplications (docs/delta_rule.md).
inline constexpr int kChunk = 8;

/// Tokens that are packed at a time, so that the packed form of a long sequence stays in cache.
inline constexpr std::int64_t kBlock = 64;
inline constexpr std::int64_t kChunksPerBlock = kBlock / kChunk;

/// What the tokens of one chunk do to each other; the state does not enter.
template <class Real>
struct ChunkCoefficients {
  Real kk[kChunk][kChunk];  // Γ_ij (k_i · k_j) below the diagonal
  Real qk[kChunk][kChunk];  // Γ_ij (q_i · k_j) on and below it; q carries the scale
  Real from_start[kChunk];  // γ_i: decay from the chunk's start to after token i
  Real to_end[kChunk];      // Γ_Ci: decay from after token i to the chunk's end
  Real beta[kChunk];
};

/// One value head of one sequence, walked from its first token to its last.
struct Head {
  Sequence sequence;
  std::int64_t key_head = 0;
  std::int64_t value_head = 0;
};

/// Packed inputs of up to `kBlock` tokens of one head.
template <class Real>
struct ForwardBlock {
  explicit ForwardBlock(const Shape& shape)
      : key_stride(round_up(shape.K, kPanel<Real>)),
        value_stride(round_up(shape.V, kPanel<Real>)),
        rows(static_cast<std::size_t>(2 * kChunk * key_stride)),
        keys_and_queries(static_cast<std::size_t>(kChunksPerBlock * key_stride * 2 * kChunk)),
        values(static_cast<std::size_t>(kBlock * value_stride)),
        outputs(static_cast<std::size_t>(kBlock * value_stride)) {}

  Real* packed(std::int64_t chunk) {
    return keys_and_queries.data() + chunk * key_stride * 2 * kChunk;
  }

  std::int64_t key_stride;
  std::int64_t value_stride;
  AlignedBuffer<Real> rows;              // [2 C, key_stride]: the chunk being packed
  AlignedBuffer<Real> keys_and_queries;  // [chunks, key_stride, 2 C]: C keys, then C queries
  AlignedBuffer<Real> values;            // [kBlock, value_stride]
  AlignedBuffer<Real> outputs;           // [kBlock, value_stride]
  ChunkCoefficients<Real> coefficients[kChunksPerBlock];
};

template <class Real>
void load_padded_row(const ConstView& view, std::int64_t batch, std::int64_t token,
                     std::int64_t head, std::int64_t size, std::int64_t stride, Real* out) {
  load_row<Real>(view.at(batch, token, head), view.dtype, size, out);
  std::fill(out + size, out + stride, Real{0});
}

/// The decay factor exp(g) of a token, 1 without a gate. Decays over several tokens are products of
/// these: a gate of −∞ is an exact zero, and no difference of large sums is ever formed.
template <class Real, class Params>
Real decay_of(const Params& params, const Head& head, std::int64_t token) {
  if (!params.g) return Real{1};
  const auto* g = params.g.at(head.sequence.batch, token, head.value_head);
  return std::exp(load_scalar<Real>(g, params.g.dtype));
}

/// Loads a key or query row, normalised and scaled as the call asks.
template <class Params, class Real>
void load_feature_row(const Params& params, const ConstView& view, Real scale, const Head& head,
                      std::int64_t token, std::int64_t stride, Real* out) {
  load_padded_row(view, head.sequence.batch, token, head.key_head, params.shape.K, stride, out);
  const Real norm = params.use_qk_l2norm ? inverse_norm(out, params.shape.K) : Real{1};
  if (norm * scale != Real{1}) scale_row(out, norm * scale, params.shape.K, out);
}

/// Products of a chunk's packed keys with its keys and queries: sums[j][0..C) = k_j · k_i and
/// sums[j][C..2C) = k_j · q_i.
template <class Real>
void multiply_pairs(const Real* HWY_RESTRICT packed, std::int64_t keys,
                    Real (*HWY_RESTRICT sums)[2 * kChunk]) {
  const hn::CappedTag<Real, 2 * kChunk> d;
  constexpr auto kLanes = static_cast<int>(hn::MaxLanes(d));
  for (int part = 0; part < 2 * kChunk; part += kLanes) {
    hn::Vec<decltype(d)> sum[kChunk];
#pragma GCC unroll 8
    for (int j = 0; j < kChunk; ++j) sum[j] = hn::Zero(d);
    const Real* row = packed;
    for (std::int64_t r = 0; r < keys; ++r, row += 2 * kChunk) {
      const auto features = hn::Load(d, row + part);
#pragma GCC unroll 8
      for (int j = 0; j < kChunk; ++j) {
        sum[j] = hn::MulAdd(hn::Set(d, row[j]), features, sum[j]);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kChunk; ++j) hn::Store(sum[j], d, sums[j] + part);
  }
}

/// Fills decays and decayed products from the tokens' decay factors and `multiply_pairs`.
template <class Real>
void decay_pairs(const Real* decay, const Real (*sums)[2 * kChunk], ChunkCoefficients<Real>& out) {
  Real product = 1;
  for (int i = 0; i < kChunk; ++i) out.from_start[i] = product *= decay[i];
  for (int j = 0; j < kChunk; ++j) {
    Real gamma = 1;  // Γ_ij for i = j, then decayed token by token
    out.qk[j][j] = sums[j][kChunk + j];
    for (int i = j + 1; i < kChunk; ++i) {
      gamma *= decay[i];
      out.kk[i][j] = gamma * sums[j][i];
      out.qk[i][j] = gamma * sums[j][kChunk + i];
    }
    out.to_end[j] = gamma;
  }
}

/// A row of keys or queries on its way into a packed chunk: where it lies, and its factor.
template <class Real>
struct FeatureRow {
  const Real* data;
  Real scale;
};

/// A key or query row of the call, or its copy in `scratch` where it has another type or
/// `transpose` would read past its end. The normalisation and the scale stay a factor.
template <class Params, class Real>
FeatureRow<Real> feature_row(const Params& params, const ConstView& view, Real scale,
                             const Head& head, std::int64_t token, std::int64_t stride,
                             Real* scratch) {
  const void* row = view.at(head.sequence.batch, token, head.key_head);
  const Real* data = static_cast<const Real*>(row);
  if (view.dtype != dtype_of<Real>() || params.shape.K % kTransposeBlock<Real> != 0) {
    load_padded_row(view, head.sequence.batch, token, head.key_head, params.shape.K, stride,
                    scratch);
    data = scratch;
  }
  return {data, params.use_qk_l2norm ? scale * inverse_norm(data, params.shape.K) : scale};
}

/// Packs the keys and queries of tokens [first, first + count) of one chunk; missing ones are zero.
template <class Real>
void pack_features(const RuleParams<Real>& params, const Head& head, std::int64_t first,
                   std::int64_t count, std::int64_t chunk, ForwardBlock<Real>& block) {
  const std::int64_t stride = block.key_stride;
  const Real* rows[2 * kChunk];
  Real scale[2 * kChunk];
  const auto place = [&](int index, const ConstView& view, Real factor, std::int64_t i) {
    Real* scratch = block.rows.data() + index * stride;
    if (i < count && view) {
      const auto row = feature_row(params, view, factor, head, first + i, stride, scratch);
      rows[index] = row.data;
      scale[index] = row.scale;
    } else {
      std::fill(scratch, scratch + stride, Real{0});
      rows[index] = scratch;
      scale[index] = 0;
    }
  };
  for (int i = 0; i < kChunk; ++i) {
    place(i, params.k, Real{1}, i);
    place(kChunk + i, params.q, static_cast<Real>(params.scale), i);
  }
  transpose_rows(rows, scale, 2 * kChunk, params.shape.K, block.packed(chunk), 2 * kChunk);
}

/// Packs tokens [begin, begin + count) of a head. Missing tokens of the last chunk become zero keys
/// with β = 0 and no decay, which leave the state alone.
template <class Real>
void pack_block(const RuleParams<Real>& params, const Head& head, std::int64_t begin,
                std::int64_t count, ForwardBlock<Real>& block) {
  const auto batch = head.sequence.batch;
  const std::int64_t first = head.sequence.begin + begin;
  for (std::int64_t chunk = 0; chunk * kChunk < count; ++chunk) {
    Real decay[kChunk];
    auto& coefficients = block.coefficients[chunk];
    for (int i = 0; i < kChunk; ++i) {
      const std::int64_t token = chunk * kChunk + i;
      Real* value = block.values.data() + token * block.value_stride;
      if (token < count) {
        load_padded_row(params.v, batch, first + token, head.value_head, params.shape.V,
                        block.value_stride, value);
        decay[i] = decay_of<Real>(params, head, first + token);
        coefficients.beta[i] = load_scalar<Real>(
            params.beta.at(batch, first + token, head.value_head), params.beta.dtype);
      } else {
        std::fill(value, value + block.value_stride, Real{0});
        decay[i] = 1;
        coefficients.beta[i] = 0;
      }
    }
    pack_features(params, head, first + chunk * kChunk, count - chunk * kChunk, chunk, block);
    alignas(AlignedBuffer<Real>::kAlignment) Real sums[kChunk][2 * kChunk];
    multiply_pairs(block.packed(chunk), params.shape.K, sums);
    decay_pairs(decay, sums, coefficients);
  }
}

/// reads[i] ← Sᵀ x_i for the C packed rows that start at `features`, `kColumns` to a channel.
template <int kColumns, class Real>
HWY_INLINE void read_state(const Real* HWY_RESTRICT state, const Real* HWY_RESTRICT features,
                           std::int64_t keys, Vector<Real> (&reads)[kChunk][kPanelVectors]) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  Vector<Real> sum[kChunk][kPanelVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) sum[i][j] = hn::Zero(d);
  }
  for (std::int64_t r = 0; r < keys; ++r, state += kPanel<Real>, features += kColumns) {
    Vector<Real> row[kPanelVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) row[j] = hn::Load(d, state + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
      const auto x = hn::Set(d, features[i]);
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) sum[i][j] = hn::MulAdd(x, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) reads[i][j] = sum[i][j];
  }
}

/// S ← decay · S + Σ_i k_i w_iᵀ over the C packed keys.
template <class Real>
HWY_INLINE void write_state(Real* HWY_RESTRICT state, const Real* HWY_RESTRICT features,
                            std::int64_t keys, Real decay,
                            const Vector<Real> (&writes)[kChunk][kPanelVectors]) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  const auto factor = hn::Set(d, decay);
  Vector<Real> w[kChunk][kPanelVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) w[i][j] = writes[i][j];
  }
  for (std::int64_t r = 0; r < keys; ++r, state += kPanel<Real>, features += 2 * kChunk) {
    Vector<Real> row[kPanelVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      row[j] = hn::Mul(factor, hn::Load(d, state + j * kLanes));
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

/// What `step_chunk` writes beside the state.
enum class Emit {
  kOutput,  // o
  kError,   // e_i = v_i − α_i S_{i−1}ᵀ k_i, which the backward pass needs
};

/// One chunk on one panel of the state. `values` and `outputs` point at the panel's first column;
/// their rows are `value_stride` apart.
template <Emit kEmit, class Real>
HWY_INLINE void step_chunk(const ChunkCoefficients<Real>& c, const Real* packed, std::int64_t keys,
                           const Real* values, std::int64_t value_stride, Real* state,
                           Real* outputs) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  Vector<Real> writes[kChunk][kPanelVectors];  // reads of the keys, then u, then Γ_Ci u_i
  Vector<Real> reads[kChunk][kPanelVectors];   // reads of the queries
  read_state<2 * kChunk>(state, packed, keys, writes);
  if constexpr (kEmit == Emit::kOutput) read_state<2 * kChunk>(state, packed + kChunk, keys, reads);

  for (int i = 0; i < kChunk; ++i) {
    for (int j = 0; j < kPanelVectors; ++j) {
      const auto value = hn::Load(d, values + i * value_stride + j * kLanes);
      auto error = hn::NegMulAdd(hn::Set(d, c.from_start[i]), writes[i][j], value);
      for (int before = 0; before < i; ++before) {
        error = hn::NegMulAdd(hn::Set(d, c.kk[i][before]), writes[before][j], error);
      }
      if constexpr (kEmit == Emit::kError) {
        hn::Store(error, d, outputs + i * value_stride + j * kLanes);
      }
      writes[i][j] = hn::Mul(hn::Set(d, c.beta[i]), error);
    }
  }
  if constexpr (kEmit == Emit::kOutput) {
    for (int i = 0; i < kChunk; ++i) {
      for (int j = 0; j < kPanelVectors; ++j) {
        auto output = hn::Mul(hn::Set(d, c.from_start[i]), reads[i][j]);
        for (int before = 0; before <= i; ++before) {
          output = hn::MulAdd(hn::Set(d, c.qk[i][before]), writes[before][j], output);
        }
        hn::Store(output, d, outputs + i * value_stride + j * kLanes);
      }
    }
  }
  for (int i = 0; i < kChunk; ++i) {
    for (int j = 0; j < kPanelVectors; ++j) {
      writes[i][j] = hn::Mul(hn::Set(d, c.to_end[i]), writes[i][j]);
    }
  }
  write_state(state, packed, keys, c.from_start[kChunk - 1], writes);
}

/// Copies columns of a [K, V] state into panels, or zeros where there is none.
template <class Real>
void load_state(const Real* state, const Shape& shape, std::int64_t first_panel,
                std::int64_t panels, Real* out) {
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t column = (first_panel + panel) * kPanel<Real>;
    const std::int64_t width = std::min(kPanel<Real>, shape.V - column);
    for (std::int64_t r = 0; r < shape.K; ++r, out += kPanel<Real>) {
      std::fill(out, out + kPanel<Real>, Real{0});
      if (state != nullptr) std::copy_n(state + r * shape.V + column, width, out);
    }
  }
}

template <class Real>
void store_state(const Real* panels_of_state, const Shape& shape, std::int64_t first_panel,
                 std::int64_t panels, Real* out) {
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t column = (first_panel + panel) * kPanel<Real>;
    const std::int64_t width = std::min(kPanel<Real>, shape.V - column);
    for (std::int64_t r = 0; r < shape.K; ++r, panels_of_state += kPanel<Real>) {
      std::copy_n(panels_of_state, width, out + r * shape.V + column);
    }
  }
}

/// Stores columns [first_column, first_column + columns) of a block's outputs, rows of `stride`.
template <class Real>
void store_outputs(const View& o, const Head& head, std::int64_t begin, std::int64_t count,
                   const Real* outputs, std::int64_t stride, std::int64_t first_column,
                   std::int64_t columns) {
  const std::int64_t offset = first_column * static_cast<std::int64_t>(size_of(o.dtype));
  for (std::int64_t i = 0; i < count; ++i) {
    void* row = o.at(head.sequence.batch, head.sequence.begin + begin + i, head.value_head);
    store_row(outputs + i * stride + first_column, columns, static_cast<std::byte*>(row) + offset,
              o.dtype);
  }
}

/// Runs `panels` panels of one head over its whole sequence.
template <class Real>
void forward_head(const RuleParams<Real>& params, std::int64_t n, std::int64_t value_head,
                  std::int64_t first_panel, std::int64_t panels) {
  const Shape& shape = params.shape;
  const Head head{params.sequence(n), value_head / params.value_heads_per_key_head(), value_head};
  const std::int64_t offset = params.state_offset(n, value_head);
  const std::int64_t first_column = first_panel * kPanel<Real>;
  const std::int64_t columns = std::min(panels * kPanel<Real>, shape.V - first_column);

  AlignedBuffer<Real> state(static_cast<std::size_t>(panels * shape.K * kPanel<Real>));
  const Real* initial = params.initial_state ? params.initial_state + offset : nullptr;
  load_state(initial, shape, first_panel, panels, state.data());

  ForwardBlock<Real> block(shape);
  for (std::int64_t begin = 0; begin < head.sequence.length; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, head.sequence.length - begin);
    pack_block(params, head, begin, count, block);
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      Real* panel_state = state.data() + panel * shape.K * kPanel<Real>;
      const std::int64_t column = first_column + panel * kPanel<Real>;
      for (std::int64_t chunk = 0; chunk * kChunk < count; ++chunk) {
        const std::int64_t row = chunk * kChunk * block.value_stride + column;
        step_chunk<Emit::kOutput>(block.coefficients[chunk], block.packed(chunk), shape.K,
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

/// Cuts a call into heads and, where those are too few for the executor's threads, into panels of
/// columns: `body(n, value_head, first_panel, panels)`. Columns never meet, so the cut changes no
/// bit.
template <class Real, class Body>
void for_each_column_slice(const Packing& call, const Executor& executor, const Body& body) {
  const std::int64_t heads = call.sequences() * call.shape.HV;
  const std::int64_t panels = round_up(call.shape.V, kPanel<Real>) / kPanel<Real>;
  const std::int64_t wanted = heads == 0 ? 1 : (2 * executor.threads + heads - 1) / heads;
  const bool enough_heads = heads >= executor.threads && heads % executor.threads == 0;
  const std::int64_t parts = enough_heads ? 1 : std::clamp<std::int64_t>(wanted, 1, panels);
  const std::int64_t panels_per_part = (panels + parts - 1) / parts;
  executor.run(heads * parts, [&](std::int64_t task) {
    const std::int64_t head = task / parts;
    const std::int64_t first = task % parts * panels_per_part;
    const std::int64_t count = std::min(panels_per_part, panels - first);
    if (count > 0) body(head / call.shape.HV, head % call.shape.HV, first, count);
  });
}

/// The chunkwise form over all heads.
template <class Real>
void forward(const RuleParams<Real>& params, const Executor& executor) {
  for_each_column_slice<Real>(params, executor, [&](auto n, auto head, auto first, auto panels) {
    forward_head(params, n, head, first, panels);
  });
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
