// The chunkwise form of the (gated) delta rule, backward. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_CHUNKWISE_BACKWARD_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_CHUNKWISE_BACKWARD_INL_HPP_
#undef FASTWEIGHTS_CORE_CHUNKWISE_BACKWARD_INL_HPP_
#else
#define FASTWEIGHTS_CORE_CHUNKWISE_BACKWARD_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/chunkwise-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// Tokens of one chunk of the backward pass. Larger than the forward one: each chunk transposes two
/// states, which 32 tokens pay for.
inline constexpr std::int64_t kBackwardChunk = 32;

/// Tokens whose chunk states are held at once; longer sequences are recomputed segment by segment.
inline constexpr std::int64_t kSegment = 4096;

/// Scratch of one head's backward pass. Names follow the derivation in docs/delta_rule.md.
template <class Real>
struct BackwardScratch {
  static constexpr std::int64_t C = kBackwardChunk;
  // `transpose` moves whole blocks, and so reads this far past the last row of a state.
  static constexpr std::int64_t kSlack = kTransposeBlock<Real> * kPanel<Real>;

  BackwardScratch(const Shape& s, std::int64_t segment_tokens)
      : shape(s),
        key_stride(round_up(s.K, kPanel<Real>)),
        value_stride(round_up(s.V, kPanel<Real>)),
        token_stride(round_up(C, kPanel<Real>)),
        state_size(value_stride * s.K),
        states(size(round_up(segment_tokens, C) / C * state_size + kSlack)),
        errors(size(round_up(segment_tokens, kBlock) * value_stride)),
        d_state(size(state_size + kSlack)),
        state_transposed(size(key_stride * value_stride)),
        d_state_transposed(size(key_stride * value_stride)),
        k(size(C * key_stride)),
        q(size(C * key_stride)),
        features_transposed(size(key_stride * token_stride)),
        writes_transposed(size(value_stride * token_stride)),
        d_k(size(C * key_stride)),
        d_q(size(C * key_stride)),
        d_o(size(C * value_stride)),
        u(size(C * value_stride)),
        x(size(C * value_stride)),
        key_reads_of_d_state(size(C * value_stride)),
        rows(size(C * value_stride)),
        kk(size(C * token_stride)),
        qk(size(C * token_stride)),
        d_kk(size(C * token_stride)),
        d_qk(size(C * token_stride)),
        gamma(size(C * token_stride)) {}

  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

  std::int64_t value_panels() const { return value_stride / kPanel<Real>; }
  std::int64_t key_panels() const { return key_stride / kPanel<Real>; }
  std::int64_t token_panels() const { return token_stride / kPanel<Real>; }

  Shape shape;
  std::int64_t key_stride;
  std::int64_t value_stride;
  std::int64_t token_stride;
  std::int64_t state_size;
  AlignedBuffer<Real> states;              // S before each chunk of the segment, panel-major [K, V]
  AlignedBuffer<Real> errors;              // e = v − α Sᵀk, [tokens, V]
  AlignedBuffer<Real> d_state;             // panel-major [K, V]
  AlignedBuffer<Real> state_transposed;    // row-major [V, K]
  AlignedBuffer<Real> d_state_transposed;  // row-major [V, K]
  AlignedBuffer<Real> k;                   // [C, K]
  AlignedBuffer<Real> q;                   // [C, K], scaled
  AlignedBuffer<Real> features_transposed;   // [K, C]
  AlignedBuffer<Real> writes_transposed;     // [V, C]
  AlignedBuffer<Real> d_k;                   // [C, K]
  AlignedBuffer<Real> d_q;                   // [C, K]
  AlignedBuffer<Real> d_o;                   // [C, V]
  AlignedBuffer<Real> u;                     // [C, V]
  AlignedBuffer<Real> x;                     // [C, V]: d(β e), then dv
  AlignedBuffer<Real> key_reads_of_d_state;  // [C, V]
  AlignedBuffer<Real> rows;                  // [C, V]
  AlignedBuffer<Real> kk;                    // [C, C] Γ (k · k), strictly lower
  AlignedBuffer<Real> qk;                    // [C, C] Γ (q · k), lower
  AlignedBuffer<Real> d_kk;                  // [C, C]
  AlignedBuffer<Real> d_qk;                  // [C, C]
  AlignedBuffer<Real> gamma;                 // [C, C] Γ_ij, zero above the diagonal
  Real beta[C];
  Real decay[C];
  Real from_start[C];
  Real to_end[C];  // on what is stored of d_state
  double log_decay;
  PendingDecay pending;    // of d_state
  double d_from_start[C];  // gradient of log γ_i
  double d_to_end[C];      // gradient of log Γ_Ci
};

/// Recomputes a segment forward from `state` (panel-major, advanced to the segment's end): the
/// states before its chunks and the errors of its tokens. With `states` null only the state is
/// advanced. No decay waits when a segment ends.
template <class Real>
void recompute_segment(const RuleParams<Real>& call, const Head& head, std::int64_t begin,
                       std::int64_t count, Real* state, DeltaBlock<Real>& block,
                       TokenBlock<Real>& rows, Real* states, Real* errors) {
  using Form = DeltaForm<Emit::kError>;
  RuleParams<Real> params = call;
  params.q = {};  // enters neither states nor errors
  const Shape& shape = params.shape;
  const std::int64_t stride = round_up(shape.V, kPanel<Real>);
  const std::int64_t panels = stride / kPanel<Real>;
  const std::int64_t panel_size = shape.K * kPanel<Real>;
  constexpr std::int64_t kSnapshot = kBackwardChunk / kChunk;
  RowPrefetch<Real> prefetch;
  typename Form::template Pending<Real> pending(shape);
  for (std::int64_t done = 0; done < count; done += kBlock) {
    const std::int64_t tokens = std::min(kBlock, count - done);
    Form::pack(params, head, begin + done, tokens, done + tokens == count, pending, block);
    rows.load(params, head, begin + done, tokens);
    Real* block_errors = errors != nullptr ? errors + done * stride : rows.outputs;
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      Real* panel_state = state + panel * panel_size;
      for (std::int64_t chunk = 0; chunk * kChunk < tokens; ++chunk) {
        if (states != nullptr && chunk % kSnapshot == 0) {
          const std::int64_t index = done / kBackwardChunk + chunk / kSnapshot;
          scale_row(panel_state, block.coefficients[chunk].before, panel_size,
                    states + (index * panels + panel) * panel_size);
        }
        const std::int64_t token = chunk * kChunk;
        const std::int64_t column = panel * kPanel<Real>;
        Form::step(
            block, chunk, shape,
            ChunkRows<Real>{rows.values + token * rows.value_stride + column, rows.value_stride,
                            block_errors + token * stride + column, stride},
            prefetch, panel_state, static_cast<Real*>(nullptr));
      }
    }
  }
}

/// Loads the rows and gates of one chunk; tokens past `count` are zero with β = 0 and no decay.
template <class Real>
void load_chunk(const RuleParams<Real>& params, const RuleGradients<Real>& grads, const Head& head,
                std::int64_t begin, std::int64_t count, const Real* errors,
                BackwardScratch<Real>& s) {
  constexpr std::int64_t C = kBackwardChunk;
  const std::int64_t first = head.sequence.begin + begin;
  const auto batch = head.sequence.batch;
  s.log_decay = 0;
  for (std::int64_t i = 0; i < C; ++i) {
    Real* k = s.k.data() + i * s.key_stride;
    Real* q = s.q.data() + i * s.key_stride;
    Real* d_o = s.d_o.data() + i * s.value_stride;
    Real* u = s.u.data() + i * s.value_stride;
    if (i >= count) {
      std::fill_n(k, s.key_stride, Real{0});
      std::fill_n(q, s.key_stride, Real{0});
      std::fill_n(d_o, s.value_stride, Real{0});
      std::fill_n(u, s.value_stride, Real{0});
      s.beta[i] = 0;
      s.decay[i] = 1;
      continue;
    }
    const std::int64_t t = first + i;
    load_feature_row(params, params.k, Real{1}, head, t, s.key_stride, k);
    load_feature_row(params, params.q, static_cast<Real>(params.scale), head, t, s.key_stride, q);
    if (grads.d_o) {
      load_padded_row(grads.d_o, batch, t, head.value_head, params.shape.V, s.value_stride, d_o);
    } else {
      std::fill_n(d_o, s.value_stride, Real{0});
    }
    s.decay[i] = decay_of<Real>(params, head, t);
    if (params.g) s.log_decay += load_gate<double>(params.g, head, t);
    s.beta[i] = load_scalar<Real>(params.beta.at(batch, t, head.value_head), params.beta.dtype);
    scale_row(errors + i * s.value_stride, s.beta[i], s.value_stride, u);
  }
}

/// Decays and decayed pair products of the loaded chunk.
template <class Real>
void relate_tokens(BackwardScratch<Real>& s) {
  constexpr std::int64_t C = kBackwardChunk;
  const std::int64_t stride = s.token_stride;
  Real product = 1;
  for (std::int64_t i = 0; i < C; ++i) s.from_start[i] = product *= s.decay[i];
  std::fill_n(s.gamma.data(), C * stride, Real{0});
  for (std::int64_t j = 0; j < C; ++j) s.gamma[BackwardScratch<Real>::size(j * stride + j)] = 1;
  for (std::int64_t i = 1; i < C; ++i) {
    scale_row(s.gamma.data() + (i - 1) * stride, s.decay[i], i, s.gamma.data() + i * stride);
  }
  const auto pending = static_cast<Real>(s.pending.scale());
  for (std::int64_t j = 0; j < C; ++j) {
    s.to_end[j] = pending * s.gamma[BackwardScratch<Real>::size((C - 1) * stride + j)];
  }

  transpose(s.k.data(), s.key_stride, C, s.shape.K, s.features_transposed.data(), stride);
  const auto keys = row_major(s.features_transposed.data(), stride);
  multiply<Real>(C, s.shape.K, s.token_panels(), {s.k.data(), s.key_stride, 1}, keys, 0,
                 row_major(s.kk.data(), stride));
  multiply<Real>(C, s.shape.K, s.token_panels(), {s.q.data(), s.key_stride, 1}, keys, 0,
                 row_major(s.qk.data(), stride));
  for (std::int64_t i = 0; i < C; ++i) {
    Real* kk = s.kk.data() + i * stride;
    Real* qk = s.qk.data() + i * stride;
    const Real* gamma = s.gamma.data() + i * stride;
    for (std::int64_t j = 0; j < stride; ++j) {
      qk[j] = j <= i ? qk[j] * gamma[j] : Real{0};
      kk[j] = j < i ? kk[j] * gamma[j] : Real{0};
    }
  }
}

/// x ← d(β e): solves (I + diag(β) A)ᵀ x = du, where du collects what o and the next state say.
template <class Real>
void solve_writes(BackwardScratch<Real>& s) {
  constexpr std::int64_t C = kBackwardChunk;
  const std::int64_t stride = s.value_stride;
  const auto d_state = panel_major(s.d_state.data(), s.shape.K);
  multiply<Real>(C, s.shape.K, s.value_panels(), {s.k.data(), s.key_stride, 1}, d_state, 0,
                 row_major(s.key_reads_of_d_state.data(), stride));
  for (std::int64_t j = 0; j < C; ++j) {
    const Real* read = s.key_reads_of_d_state.data() + j * stride;
    scale_row(read, s.to_end[j], stride, s.x.data() + j * stride);
    s.d_to_end[j] =
        static_cast<double>(s.to_end[j]) * dot(s.u.data() + j * stride, read, s.shape.V);
  }
  multiply<Real>(C, C, s.value_panels(), {s.qk.data(), 1, s.token_stride},
                 row_major(s.d_o.data(), stride), 1, row_major(s.x.data(), stride));
  for (std::int64_t i = C - 1; i > 0; --i) {
    const Real* later = s.x.data() + i * stride;
    for (std::int64_t j = 0; j < i; ++j) {
      const Real coupling = s.beta[i] * s.kk[BackwardScratch<Real>::size(i * s.token_stride + j)];
      add_scaled_row(later, -coupling, stride, s.x.data() + j * stride);
    }
  }
}

/// Gradients of the pair products, still to be decayed: d_kk = −dv uᵀ, d_qk = d_o uᵀ. x becomes dv.
template <class Real>
void differentiate_pairs(BackwardScratch<Real>& s) {
  constexpr std::int64_t C = kBackwardChunk;
  transpose(s.u.data(), s.value_stride, C, s.shape.V, s.writes_transposed.data(), s.token_stride);
  const auto writes = row_major(s.writes_transposed.data(), s.token_stride);
  for (std::int64_t i = 0; i < C; ++i) {
    Real* x = s.x.data() + i * s.value_stride;
    scale_row(x, s.beta[i], s.value_stride, x);
  }
  multiply<Real>(C, s.shape.V, s.token_panels(), {s.x.data(), s.value_stride, 1}, writes, 0,
                 row_major(s.d_kk.data(), s.token_stride));
  multiply<Real>(C, s.shape.V, s.token_panels(), {s.d_o.data(), s.value_stride, 1}, writes, 0,
                 row_major(s.d_qk.data(), s.token_stride));
}

/// Adds to the gradients of the log-decays what the pairs say, then turns d_kk and d_qk into the
/// gradients of the bare products k · k and q · k.
template <class Real>
void decay_pair_gradients(BackwardScratch<Real>& s, double (&d_log_decay)[kBackwardChunk]) {
  constexpr std::int64_t C = kBackwardChunk;
  double weight[C][C];
  for (std::int64_t i = 0; i < C; ++i) {
    const std::int64_t offset = i * s.token_stride;
    Real* d_kk = s.d_kk.data() + offset;
    Real* d_qk = s.d_qk.data() + offset;
    const Real* kk = s.kk.data() + offset;
    const Real* qk = s.qk.data() + offset;
    const Real* gamma = s.gamma.data() + offset;
    for (std::int64_t j = 0; j < i; ++j) {
      weight[i][j] = static_cast<double>(d_qk[j]) * qk[j] - static_cast<double>(d_kk[j]) * kk[j];
    }
    for (std::int64_t j = 0; j < s.token_stride; ++j) {
      d_qk[j] = j <= i ? d_qk[j] * gamma[j] : Real{0};
      d_kk[j] = j < i ? -d_kk[j] * gamma[j] : Real{0};
    }
  }
  // log Γ_ij is the sum of g over (j, i]: token t takes every pair with j < t ≤ i. Nothing is
  // subtracted, lest pairs that do not span a strong gate drown those that do.
  double until_later[C] = {};  // for each j: Σ of weight_ij over i ≥ t
  for (std::int64_t t = C - 1; t >= 0; --t) {
    double sum = 0;
    for (std::int64_t j = 0; j < t; ++j) sum += until_later[j] += weight[t][j];
    d_log_decay[t] = sum;
  }
}

/// Gradients of keys and queries within the chunk and through the states around it.
template <class Real>
void differentiate_features(const Real* state, BackwardScratch<Real>& s) {
  constexpr std::int64_t C = kBackwardChunk;
  const Shape& shape = s.shape;
  for (std::int64_t panel = 0; panel < s.value_panels(); ++panel) {
    const std::int64_t offset = panel * shape.K * kPanel<Real>;
    const std::int64_t row = panel * kPanel<Real> * s.key_stride;
    const std::int64_t columns = std::min(kPanel<Real>, shape.V - panel * kPanel<Real>);
    transpose(state + offset, kPanel<Real>, shape.K, columns, s.state_transposed.data() + row,
              s.key_stride);
    transpose(s.d_state.data() + offset, kPanel<Real>, shape.K, columns,
              s.d_state_transposed.data() + row, s.key_stride);
  }
  const auto state_t = row_major(s.state_transposed.data(), s.key_stride);
  const auto d_state_t = row_major(s.d_state_transposed.data(), s.key_stride);
  const auto d_k = row_major(s.d_k.data(), s.key_stride);
  const auto d_q = row_major(s.d_q.data(), s.key_stride);
  const std::int64_t panels = s.key_panels();

  // rows ← γ_i d_o_i, and the read of the queries: dq = γ S d_o.
  for (std::int64_t i = 0; i < C; ++i) {
    const std::int64_t offset = i * s.value_stride;
    scale_row(s.d_o.data() + offset, s.from_start[i], s.value_stride, s.d_o.data() + offset);
    scale_row(s.x.data() + offset, -s.from_start[i], s.value_stride, s.rows.data() + offset);
  }
  multiply<Real>(C, shape.V, panels, {s.d_o.data(), s.value_stride, 1}, state_t, 0, d_q);
  multiply<Real>(C, shape.V, panels, {s.rows.data(), s.value_stride, 1}, state_t, 0, d_k);
  for (std::int64_t i = 0; i < C; ++i) {
    const std::int64_t offset = i * s.key_stride;
    s.d_from_start[i] =
        static_cast<double>(dot(s.q.data() + offset, s.d_q.data() + offset, shape.K)) +
        static_cast<double>(dot(s.k.data() + offset, s.d_k.data() + offset, shape.K));
  }
  // What the writes of this chunk mean for the state after it: dk = Γ_Ci dS u.
  for (std::int64_t i = 0; i < C; ++i) {
    const std::int64_t offset = i * s.value_stride;
    scale_row(s.u.data() + offset, s.to_end[i], s.value_stride, s.u.data() + offset);
  }
  multiply<Real>(C, shape.V, panels, {s.u.data(), s.value_stride, 1}, d_state_t, 1, d_k);
  // Pairs: dq_i = Σ_j d_qk_ij k_j; dk gets the transposes too.
  const auto keys = row_major(s.k.data(), s.key_stride);
  const auto queries = row_major(s.q.data(), s.key_stride);
  multiply<Real>(C, C, panels, {s.d_qk.data(), s.token_stride, 1}, keys, 1, d_q);
  multiply<Real>(C, C, panels, {s.d_kk.data(), s.token_stride, 1}, keys, 1, d_k);
  multiply<Real>(C, C, panels, {s.d_kk.data(), 1, s.token_stride}, keys, 1, d_k);
  multiply<Real>(C, C, panels, {s.d_qk.data(), 1, s.token_stride}, queries, 1, d_k);
}

/// Gradient of the state before the chunk; returns ⟨dS, γ_C S⟩, the gradient of the whole decay.
/// With `settle` no decay of dS waits afterwards.
template <class Real>
double differentiate_state(const Real* state, bool settle, BackwardScratch<Real>& s) {
  constexpr std::int64_t C = kBackwardChunk;
  double kept = 0;
  const std::int64_t panel = s.shape.K * kPanel<Real>;
  for (std::int64_t begin = 0; begin < s.state_size; begin += panel) {
    kept += dot(s.d_state.data() + begin, state + begin, panel);
  }
  const double whole = std::exp(s.log_decay);
  kept *= whole * s.pending.scale();
  const auto decay = static_cast<Real>(s.pending.take(whole, settle));
  const auto after = static_cast<Real>(1 / s.pending.scale());
  if (after != Real{1}) {
    scale_row(s.rows.data(), after, C * s.value_stride, s.rows.data());
    scale_row(s.d_o.data(), after, C * s.value_stride, s.d_o.data());
  }
  const auto d_state = panel_major(s.d_state.data(), s.shape.K);
  multiply<Real>(s.shape.K, C, s.value_panels(), {s.k.data(), 1, s.key_stride},
                 row_major(s.rows.data(), s.value_stride), decay, d_state);
  multiply<Real>(s.shape.K, C, s.value_panels(), {s.q.data(), 1, s.key_stride},
                 row_major(s.d_o.data(), s.value_stride), 1, d_state);
  return kept;
}

/// Writes the gradient of a key or query row, back through the scale and the normalisation:
/// with y = r x and r = rsqrt(Σx² + ε), dx = r (dy − y (y · dy)).
template <class Real>
void store_feature_gradient(const RuleParams<Real>& params, const ConstView& input,
                            const View& output, Real scale, const Head& head, std::int64_t token,
                            Real* gradient) {
  const std::int64_t size = params.shape.K;
  scale_row(gradient, scale, size, gradient);
  if (params.use_qk_l2norm) {
    Real row[kMaxHeadSize];
    load_row<Real>(input.at(head.sequence.batch, token, head.key_head), input.dtype, size, row);
    const Real norm = inverse_norm(row, size);
    scale_row(row, norm, size, row);
    add_scaled_row(row, -dot(row, gradient, size), size, gradient);
    scale_row(gradient, norm, size, gradient);
  }
  store_row(gradient, size, output.at(head.sequence.batch, token, head.key_head), output.dtype);
}

/// Sums over the value heads that share a key head. A group of one needs no storage.
template <class Real>
struct FeatureSums {
  FeatureSums(std::int64_t group, std::int64_t tokens, std::int64_t stride)
      : d_q(group > 1 ? static_cast<std::size_t>(tokens * stride) : 0),
        d_k(group > 1 ? static_cast<std::size_t>(tokens * stride) : 0) {
    std::fill_n(d_q.data(), d_q.size(), Real{0});
    std::fill_n(d_k.data(), d_k.size(), Real{0});
  }
  AlignedBuffer<Real> d_q;
  AlignedBuffer<Real> d_k;
};

template <class Real>
void store_chunk(const RuleParams<Real>& params, const RuleGradients<Real>& grads, const Head& head,
                 std::int64_t begin, std::int64_t count,
                 const double (&d_log_decay)[kBackwardChunk],
                 const double (&d_beta)[kBackwardChunk], FeatureSums<Real>& sums,
                 BackwardScratch<Real>& s) {
  const auto batch = head.sequence.batch;
  const std::int64_t group = params.value_heads_per_key_head();
  const bool last_of_group = head.value_head % group == group - 1;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t t = head.sequence.begin + begin + i;
    store_row(s.x.data() + i * s.value_stride, params.shape.V,
              grads.d_v.at(batch, t, head.value_head), grads.d_v.dtype);
    const auto beta_gradient = static_cast<Real>(d_beta[i]);
    store_row(&beta_gradient, 1, grads.d_beta.at(batch, t, head.value_head), grads.d_beta.dtype);
    if (grads.d_g) {
      const auto gate_gradient = static_cast<Real>(d_log_decay[i]);
      store_row(&gate_gradient, 1, grads.d_g.at(batch, t, head.value_head), grads.d_g.dtype);
    }
    Real* d_q = s.d_q.data() + i * s.key_stride;
    Real* d_k = s.d_k.data() + i * s.key_stride;
    if (group > 1) {
      const std::int64_t offset = (begin + i) * s.key_stride;
      add_scaled_row(d_q, Real{1}, s.key_stride, sums.d_q.data() + offset);
      add_scaled_row(d_k, Real{1}, s.key_stride, sums.d_k.data() + offset);
      d_q = sums.d_q.data() + offset;
      d_k = sums.d_k.data() + offset;
    }
    if (last_of_group) {
      store_feature_gradient(params, params.q, grads.d_q, static_cast<Real>(params.scale), head, t,
                             d_q);
      store_feature_gradient(params, params.k, grads.d_k, Real{1}, head, t, d_k);
    }
  }
}

/// One chunk: from the gradient of the state after it to that of the state before it.
template <class Real>
void backward_chunk(const RuleParams<Real>& params, const RuleGradients<Real>& grads,
                    const Head& head, std::int64_t begin, std::int64_t count, const Real* state,
                    const Real* errors, FeatureSums<Real>& sums, BackwardScratch<Real>& s) {
  constexpr std::int64_t C = kBackwardChunk;
  load_chunk(params, grads, head, begin, count, errors, s);
  relate_tokens(s);
  solve_writes(s);
  double d_beta[C] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    d_beta[i] = dot(s.x.data() + i * s.value_stride, errors + i * s.value_stride, params.shape.V);
  }
  differentiate_pairs(s);
  double d_log_decay[C];
  decay_pair_gradients(s, d_log_decay);
  differentiate_features(state, s);
  const double d_whole = differentiate_state(state, /*settle=*/begin == 0, s);
  // Token t decays every read from the chunk's start at i ≥ t, every write j < t on its way to the
  // chunk's end, and the state that passes through.
  double reads = 0;
  for (std::int64_t t = C - 1; t >= 0; --t) d_log_decay[t] += reads += s.d_from_start[t];
  double writes = d_whole;
  for (std::int64_t t = 0; t < C; ++t) {
    d_log_decay[t] += writes;
    writes += s.d_to_end[t];
  }
  store_chunk(params, grads, head, begin, count, d_log_decay, d_beta, sums, s);
}

/// The backward pass of one value head over one sequence.
template <class Real>
void backward_head(const RuleParams<Real>& params, const RuleGradients<Real>& grads, std::int64_t n,
                   std::int64_t value_head, FeatureSums<Real>& sums, DeltaBlock<Real>& block,
                   TokenBlock<Real>& rows, BackwardScratch<Real>& s) {
  const Shape& shape = params.shape;
  const Head head{params.sequence(n), value_head / params.value_heads_per_key_head(), value_head};
  const std::int64_t offset = params.state_offset(n, value_head);
  const std::int64_t length = head.sequence.length;
  const std::int64_t segments = (length + kSegment - 1) / kSegment;

  // The state at the start of every segment.
  AlignedBuffer<Real> starts(
      static_cast<std::size_t>(std::max<std::int64_t>(segments, 1) * s.state_size));
  load_state(params.initial_state ? params.initial_state + offset : nullptr, shape, 0,
             s.value_panels(), starts.data());
  for (std::int64_t segment = 0; segment + 1 < segments; ++segment) {
    Real* start = starts.data() + segment * s.state_size;
    std::copy_n(start, s.state_size, start + s.state_size);
    recompute_segment<Real>(params, head, segment * kSegment, kSegment, start + s.state_size, block,
                            rows, nullptr, nullptr);
  }

  load_state(grads.d_final_state ? grads.d_final_state + offset : nullptr, shape, 0,
             s.value_panels(), s.d_state.data());
  s.pending = {};
  for (std::int64_t segment = segments - 1; segment >= 0; --segment) {
    const std::int64_t begin = segment * kSegment;
    const std::int64_t count = std::min(kSegment, length - begin);
    recompute_segment(params, head, begin, count, starts.data() + segment * s.state_size, block,
                      rows, s.states.data(), s.errors.data());
    const std::int64_t chunks = (count + kBackwardChunk - 1) / kBackwardChunk;
    for (std::int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const std::int64_t first = chunk * kBackwardChunk;
      backward_chunk(params, grads, head, begin + first, std::min(kBackwardChunk, count - first),
                     s.states.data() + chunk * s.state_size,
                     s.errors.data() + first * s.value_stride, sums, s);
    }
  }
  if (grads.d_initial_state != nullptr) {
    store_state(s.d_state.data(), shape, 0, s.value_panels(), grads.d_initial_state + offset);
  }
}

/// The backward pass over all heads. A task is one key head with the value heads that read it, so
/// that every gradient has one writer and one order of summation.
template <class Real>
void backward(const RuleParams<Real>& call, const RuleGradients<Real>& grads,
              const Executor& executor) {
  RuleParams<Real> params = call;
  params.o = {};  // what is recomputed goes nowhere
  const Shape& shape = params.shape;
  const std::int64_t group = params.value_heads_per_key_head();
  executor.run(params.sequences() * shape.H, [&](std::int64_t task) {
    const std::int64_t n = task / shape.H;
    const std::int64_t length = params.sequence(n).length;
    BackwardScratch<Real> scratch(shape, std::min(length, kSegment));
    DeltaBlock<Real> block(shape);
    TokenBlock<Real> rows(shape);
    FeatureSums<Real> sums(group, length, scratch.key_stride);
    for (std::int64_t i = 0; i < group; ++i) {
      backward_head(params, grads, n, task % shape.H * group + i, sums, block, rows, scratch);
    }
  });
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
