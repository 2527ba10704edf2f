// The momentum delta rule: M ← μ M + η k (v − Sᵀp)ᵀ, S ← α S + β M, o = Sᵀq, in all its forms.
// Per-target include guard.
#if defined(FASTWEIGHTS_CORE_MOMENTUM_DELTA_RULE_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_MOMENTUM_DELTA_RULE_INL_HPP_
#undef FASTWEIGHTS_CORE_MOMENTUM_DELTA_RULE_INL_HPP_
#else
#define FASTWEIGHTS_CORE_MOMENTUM_DELTA_RULE_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "fastweights/core/token_backward-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// The numbers of one token of one head.
template <class Real>
struct MomentumGates {
  Real decay = 1;  // α = exp(g)
  Real beta = 0;
  Real mu = 1;
  Real eta = 0;
};

template <class Real>
MomentumGates<Real> load_momentum_gates(const RuleParams<Real>& params, const Head& head,
                                        std::int64_t token) {
  return {decay_of<Real>(params, head, token), load_gate<Real>(params.beta, head, token),
          load_gate<Real>(params.mu, head, token), load_gate<Real>(params.eta, head, token)};
}

/// Loads q, k and the reading row p, which is k where none is given.
template <class Real>
void load_momentum_rows(const RuleParams<Real>& params, const Head& head, std::int64_t token,
                        Real* q, Real* k, Real* p) {
  load_query_row(params, head, token, q);
  load_key_row(params, head, token, k);
  if (params.p) {
    load_row<Real>(params.p.at(head.sequence.batch, token, head.key_head), params.p.dtype,
                   params.shape.K, p);
  } else {
    std::copy_n(k, params.shape.K, p);
  }
}

// ---- chunkwise ---------------------------------------------------------------------------------

/// What the tokens of one chunk do to each other: S_i = state[i] S + momentum[i] M + Σ_j w_ij k_j
/// u_jᵀ. What is stored becomes S ← keep S + take M + Σ_j w_last[j] k_j u_jᵀ and M ← last_momentum
/// M
/// + Σ_j to_end[j] k_j u_jᵀ. S and M are what is stored of the two.
template <class Real>
struct MomentumChunk {
  Real state[kChunk + 1];
  Real momentum[kChunk + 1];
  Real pk[kChunk][kChunk];  // w_{i−1, j} (p_i · k_j) below the diagonal
  Real qk[kChunk][kChunk];  // w_ij (q_i · k_j) on and below it
  Real w_last[kChunk];      // w_Cj
  Real to_end[kChunk];      // Π μ over (j, C]
  Real keep;
  Real take;
  Real last_momentum;
  Real eta[kChunk];
};

/// Packed inputs of up to `kBlock` tokens of one head.
template <class Real>
struct MomentumBlock {
  static constexpr int kQueries = kChunk;  // rows: what is read with, queries, keys
  static constexpr int kKeys = 2 * kChunk;
  static constexpr int kRows = 3 * kChunk;

  explicit MomentumBlock(const Shape& shape)
      : padded_keys(round_up(shape.K, static_cast<std::int64_t>(hn::MaxLanes(Tag<Real>())))),
        rows(static_cast<std::size_t>(kChunksPerBlock * kRows * kRowStride<Real>)) {
    std::fill_n(rows.data(), kChunksPerBlock * kRows * kRowStride<Real>, Real{0});
  }

  Real* row(std::int64_t chunk, int row) {
    return rows.data() + (chunk * kRows + row) * kRowStride<Real>;
  }

  std::int64_t padded_keys;  // K in whole vectors
  AlignedBuffer<Real> rows;  // [chunks, kRows, kRowStride]
  MomentumChunk<Real> chunks[kChunksPerBlock];
};

/// A head's decays that wait: of S and of M.
struct PendingMomentum {
  explicit PendingMomentum(const Shape& /*shape*/) {}
  PendingDecay state;
  PendingDecay momentum;
};

/// Lets the decays of a chunk's S and M wait with the others, unless they have to be applied.
template <class Real>
void defer_momentum_decays(double state_decay, double momentum_decay, bool settle,
                           PendingMomentum& pending, MomentumChunk<Real>& out) {
  const auto state_before = static_cast<Real>(pending.state.scale());
  const auto momentum_before = static_cast<Real>(pending.momentum.scale());
  for (Real& factor : out.state) factor *= state_before;
  for (Real& factor : out.momentum) factor *= momentum_before;
  out.keep = static_cast<Real>(pending.state.take(state_decay, settle));
  out.last_momentum = static_cast<Real>(pending.momentum.take(momentum_decay, settle));
  const auto state_after = static_cast<Real>(1 / pending.state.scale());
  const auto momentum_after = static_cast<Real>(1 / pending.momentum.scale());
  out.take = state_after * out.momentum[kChunk];
  for (Real& weight : out.w_last) weight *= state_after;
  for (Real& weight : out.to_end) weight *= momentum_after;
}

/// Fills a chunk's coefficients from its gates and the packed rows' products.
template <class Real>
void relate_momentum_tokens(const MomentumGates<Real> (&gates)[kChunk], MomentumBlock<Real>& block,
                            std::int64_t chunk) {
  using Block = MomentumBlock<Real>;
  auto& c = block.chunks[chunk];
  c.state[0] = 1;
  c.momentum[0] = 0;
  Real mu_product = 1;
  for (int i = 0; i < kChunk; ++i) {
    mu_product *= gates[i].mu;
    c.state[i + 1] = gates[i].decay * c.state[i];
    c.momentum[i + 1] = gates[i].decay * c.momentum[i] + gates[i].beta * mu_product;
    c.eta[i] = gates[i].eta;
  }
  for (int j = 0; j < kChunk; ++j) {
    const Real* k = block.row(chunk, Block::kKeys + j);
    Vector<Real> sums[2 * kChunk];  // with p_i, then with q_i
    alignas(64) Real dots[2 * kChunk];
    add_dots<kChunk>(k, block.row(chunk, 0), block.padded_keys, sums);
    add_dots<kChunk>(k, block.row(chunk, Block::kQueries), block.padded_keys, sums + kChunk);
    sum_each(Tag<Real>(), sums, 2 * kChunk, dots);
    Real w = gates[j].beta;
    Real mu = 1;
    c.qk[j][j] = w * dots[kChunk + j];
    for (int i = j + 1; i < kChunk; ++i) {
      c.pk[i][j] = w * dots[i];
      mu *= gates[i].mu;
      w = gates[i].decay * w + gates[i].beta * mu;
      c.qk[i][j] = w * dots[kChunk + i];
    }
    c.w_last[j] = w;
    c.to_end[j] = mu;
  }
}

/// The momentum delta rule on packed tokens.
struct MomentumForm {
  static constexpr int kStates = 2;
  static constexpr int kReads = 4;
  template <class Real>
  using Block = MomentumBlock<Real>;
  template <class Real>
  using Pending = PendingMomentum;

  /// Missing tokens of the last chunk change nothing.
  template <class Real>
  static void pack(const RuleParams<Real>& params, const Head& head, std::int64_t begin,
                   std::int64_t count, bool settle, PendingMomentum& pending,
                   MomentumBlock<Real>& block) {
    const std::int64_t keys = params.shape.K;
    for (std::int64_t chunk = 0; chunk * kChunk < count; ++chunk) {
      MomentumGates<Real> gates[kChunk];
      double log_decay = 0;
      double mu = 1;
      for (int i = 0; i < kChunk; ++i) {
        const std::int64_t token = chunk * kChunk + i;
        Real* p = block.row(chunk, i);
        Real* q = block.row(chunk, MomentumBlock<Real>::kQueries + i);
        Real* k = block.row(chunk, MomentumBlock<Real>::kKeys + i);
        if (token < count) {
          const std::int64_t t = head.sequence.begin + begin + token;
          load_momentum_rows(params, head, t, q, k, p);
          gates[i] = load_momentum_gates(params, head, t);
          if (params.g) log_decay += load_gate<double>(params.g, head, t);
          mu *= static_cast<double>(gates[i].mu);
        } else {
          for (Real* row : {p, q, k}) std::fill_n(row, keys, Real{0});
          gates[i] = {};
        }
      }
      relate_momentum_tokens(gates, block, chunk);
      defer_momentum_decays(std::exp(log_decay), mu, settle && (chunk + 1) * kChunk >= count,
                            pending, block.chunks[chunk]);
    }
  }

  template <class Real>
  static HWY_INLINE void step(MomentumBlock<Real>& block, std::int64_t chunk, const Shape& shape,
                              const ChunkRows<Real>& rows, RowPrefetch<Real>& prefetch, Real* state,
                              Real* momentum) {
    using Block = MomentumBlock<Real>;
    constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
    const Tag<Real> d;
    const auto& c = block.chunks[chunk];
    Vector<Real> of_state[kChunk][kPanelVectors];
    Vector<Real> of_momentum[kChunk][kPanelVectors];
    Vector<Real> writes[kChunk][kPanelVectors];  // errors, then u
    read_state(state, kPanel<Real>, block.row(chunk, 0), shape.K, prefetch, of_state);
    read_state(momentum, kPanel<Real>, block.row(chunk, 0), shape.K, prefetch, of_momentum);
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) {
        auto error = hn::LoadU(d, rows.values + i * rows.value_stride + j * kLanes);
        error = hn::NegMulAdd(hn::Set(d, c.state[i]), of_state[i][j], error);
        writes[i][j] = hn::NegMulAdd(hn::Set(d, c.momentum[i]), of_momentum[i][j], error);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) {
        writes[i][j] = hn::Mul(hn::Set(d, c.eta[i]), writes[i][j]);
      }
#pragma GCC unroll 8
      for (int later = i + 1; later < kChunk; ++later) {
        const auto product = hn::Set(d, c.pk[later][i]);
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVectors; ++j) {
          writes[later][j] = hn::NegMulAdd(product, writes[i][j], writes[later][j]);
        }
      }
    }
    const Real* queries = block.row(chunk, Block::kQueries);
    read_state(state, kPanel<Real>, queries, shape.K, prefetch, of_state);
    read_state(momentum, kPanel<Real>, queries, shape.K, prefetch, of_momentum);
    for (int i = 0; i < kChunk; ++i) {
      for (int j = 0; j < kPanelVectors; ++j) {
        auto output = hn::Mul(hn::Set(d, c.state[i + 1]), of_state[i][j]);
        output = hn::MulAdd(hn::Set(d, c.momentum[i + 1]), of_momentum[i][j], output);
        for (int before = 0; before <= i; ++before) {
          output = hn::MulAdd(hn::Set(d, c.qk[i][before]), writes[before][j], output);
        }
        hn::StoreU(output, d, rows.outputs + i * rows.output_stride + j * kLanes);
      }
    }
    for (int i = 0; i < kChunk; ++i) {
      for (int j = 0; j < kPanelVectors; ++j) {
        of_state[i][j] = hn::Mul(hn::Set(d, c.w_last[i]), writes[i][j]);
        of_momentum[i][j] = hn::Mul(hn::Set(d, c.to_end[i]), writes[i][j]);
      }
    }
    const Real* keys = block.row(chunk, Block::kKeys);
    mix_panel(momentum, c.take, c.keep, shape.K, state);
    const auto keep = [](std::int64_t, Vector<Real> row) HWY_ATTR { return row; };
    write_state(state, kPanel<Real>, keys, shape.K, keep, of_state);
    const auto factor = hn::Set(d, c.last_momentum);
    const auto decay = [factor](std::int64_t, Vector<Real> row)
                           HWY_ATTR { return hn::Mul(factor, row); };
    write_state(momentum, kPanel<Real>, keys, shape.K, decay, of_momentum);
  }

  /// S ← keep · S + take · M on one panel.
  template <class Real>
  static HWY_INLINE void mix_panel(const Real* HWY_RESTRICT momentum, Real take, Real keep,
                                   std::int64_t keys, Real* HWY_RESTRICT state) {
    const Tag<Real> d;
    constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
    const auto first = hn::Set(d, keep);
    const auto second = hn::Set(d, take);
    for (std::int64_t at = 0; at < keys * kPanel<Real>; at += kLanes) {
      const auto kept = hn::Mul(first, hn::Load(d, state + at));
      hn::Store(hn::MulAdd(second, hn::Load(d, momentum + at), kept), d, state + at);
    }
  }
};

template <class Real>
void momentum_forward(const RuleParams<Real>& params, const Executor& executor) {
  forward_chunkwise<MomentumForm>(params, executor);
}

// ---- recurrent ---------------------------------------------------------------------------------

/// One token on `kVectors` vectors of columns, in place.
template <int kVectors, class D, class Real, class Stored>
HWY_INLINE void step_momentum_columns(D d, const Real* q, const Real* k, const Real* p,
                                      const MomentumGates<Real>& gates, std::int64_t keys,
                                      std::int64_t values, const Real* v, Stored* state,
                                      Stored* momentum, Real* out) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<D> write[kVectors], output[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    write[j] = hn::LoadU(d, v + j * lanes);
    output[j] = hn::Zero(d);
  }
  for (std::int64_t r = 0; r < keys; ++r) {
    const auto x = hn::Set(d, p[r]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      write[j] = hn::NegMulAdd(x, load_stored(d, state + r * values + j * lanes), write[j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) write[j] = hn::Mul(hn::Set(d, gates.eta), write[j]);
  const auto decay = hn::Set(d, gates.decay);
  const auto beta = hn::Set(d, gates.beta);
  const auto mu = hn::Set(d, gates.mu);
  for (std::int64_t r = 0; r < keys; ++r) {
    const auto x = hn::Set(d, k[r]);
    const auto query = hn::Set(d, q[r]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const std::int64_t at = r * values + j * lanes;
      const auto m = hn::MulAdd(x, write[j], hn::Mul(mu, load_stored(d, momentum + at)));
      const auto s = hn::MulAdd(beta, m, hn::Mul(decay, load_stored(d, state + at)));
      output[j] = hn::MulAdd(query, s, output[j]);
      store_stored(m, d, momentum + at);
      store_stored(s, d, state + at);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) hn::StoreU(output[j], d, out + j * lanes);
}

/// Walks one head's sequence token by token; states in bf16 are rounded after each.
template <class Real, class Stored>
void walk_momentum_tokens(const RuleParams<Real>& params, const Head& head, Stored* state,
                          Stored* momentum) {
  const Shape& shape = params.shape;
  alignas(64) Real q[kMaxHeadSize], k[kMaxHeadSize], p[kMaxHeadSize];
  alignas(64) Real v[kMaxHeadSize], out[kMaxHeadSize];
  for (std::int64_t i = 0; i < head.sequence.length; ++i) {
    const std::int64_t t = head.sequence.begin + i;
    load_momentum_rows(params, head, t, q, k, p);
    const auto gates = load_momentum_gates(params, head, t);
    load_row<Real>(params.v.at(head.sequence.batch, t, head.value_head), params.v.dtype, shape.V,
                   v);
    for_each_column_block<Real>(shape.V, [&](auto d, auto vectors, std::int64_t c) HWY_ATTR {
      step_momentum_columns<decltype(vectors)::value>(d, q, k, p, gates, shape.K, shape.V, v + c,
                                                      state + c, momentum + c, out + c);
    });
    store_row(out, shape.V, params.o.at(head.sequence.batch, t, head.value_head), params.o.dtype);
  }
}

template <class Real>
void momentum_recurrent_head(const RuleParams<Real>& params, std::int64_t n,
                             std::int64_t value_head) {
  const Head head = head_of(params, n, value_head);
  const std::int64_t offset = params.state_offset(n, value_head);
  if constexpr (std::is_same_v<Real, float>) {
    if (params.narrow_state != nullptr && head.sequence.length == 1) {
      return walk_momentum_tokens(params, head, params.narrow_state + offset,
                                  params.narrow_momentum + offset);
    }
  }
  const WorkingState<Real> state(params.initial_state, params.final_state, params.narrow_state,
                                 offset, params.shape);
  const WorkingState<Real> momentum(params.initial_momentum, params.final_momentum,
                                    params.narrow_momentum, offset, params.shape);
  walk_momentum_tokens(params, head, state.data(), momentum.data());
}

/// The recurrent form; neither state may be null, be it in `Real` or narrow.
template <class Real>
void momentum_recurrent(const RuleParams<Real>& params, const Executor& executor) {
  executor.run(params.sequences() * params.shape.HV, [&](std::int64_t task) {
    momentum_recurrent_head(params, task / params.shape.HV, task % params.shape.HV);
  });
}

// ---- backward ----------------------------------------------------------------------------------

/// Scratch of one key head's backward pass. States lie transposed, [V rounded up, key_stride].
template <class Real>
struct MomentumBackwardScratch {
  MomentumBackwardScratch(const RuleParams<Real>& params, std::int64_t tokens)
      : base(params, tokens),
        gates(static_cast<std::size_t>(base.distance)),
        d_gates(static_cast<std::size_t>(base.distance)),
        momentum(base.zeros(base.value_stride * base.key_stride)),
        d_momentum(base.zeros(base.value_stride * base.key_stride)),
        momenta(base.zeros(base.checkpoints * base.value_stride * base.key_stride)),
        slice((base.distance + 1) * kSliceRows * base.key_stride) {}

  Real* checkpoint(std::int64_t chunk) {
    return momenta.data() + chunk * base.value_stride * base.key_stride;
  }

  TokenBackwardScratch<Real> base;  // its row a is p; b and decay are not used
  std::vector<MomentumGates<Real>> gates;
  std::vector<MomentumGates<double>> d_gates;
  AlignedBuffer<Real> momentum;    // [V, K]
  AlignedBuffer<Real> d_momentum;  // [V, K]
  AlignedBuffer<Real> momenta;     // [checkpoints, V, K]: before each chunk
  AlignedBuffer<Real> slice;       // [tokens + 1, kSliceRows, K]: those within a chunk
};

/// One token forward on kSliceRows rows of both states; keeps the errors v − Sᵀp in `errors`.
template <class Real>
HWY_INLINE void step_momentum_rows(const TokenRows<Real>& x, const MomentumGates<Real>& gates,
                                   std::int64_t stride, const Real* state, const Real* momentum,
                                   Real* state_out, Real* momentum_out, const Real* values,
                                   Real* errors) {
  const Tag<Real> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  hn::Vec<decltype(d)> sum[kSliceRows];
  for (int r = 0; r < kSliceRows; ++r) sum[r] = hn::Zero(d);
  for (std::int64_t c = 0; c < stride; c += kLanes) {
    const auto p = hn::Load(d, x.a + c);
#pragma GCC unroll 4
    for (int r = 0; r < kSliceRows; ++r) {
      sum[r] = hn::MulAdd(p, hn::Load(d, state + r * stride + c), sum[r]);
    }
  }
  Real read[kSliceRows];
  sum_lanes(d, sum, read);
  hn::Vec<decltype(d)> write[kSliceRows];
  for (int r = 0; r < kSliceRows; ++r) {
    errors[r] = values[r] - read[r];
    write[r] = hn::Set(d, gates.eta * errors[r]);
  }
  const auto decay = hn::Set(d, gates.decay);
  const auto beta = hn::Set(d, gates.beta);
  const auto mu = hn::Set(d, gates.mu);
  for (std::int64_t c = 0; c < stride; c += kLanes) {
    const auto k = hn::Load(d, x.k + c);
#pragma GCC unroll 4
    for (int r = 0; r < kSliceRows; ++r) {
      const std::int64_t at = r * stride + c;
      const auto m = hn::MulAdd(k, write[r], hn::Mul(mu, hn::Load(d, momentum + at)));
      hn::Store(hn::MulAdd(beta, m, hn::Mul(decay, hn::Load(d, state + at))), d, state_out + at);
      hn::Store(m, d, momentum_out + at);
    }
  }
}

/// One token backward on kSliceRows rows, from both states before and after it; gradients of the
/// token's rows and gates are added.
template <class Real>
HWY_INLINE void differentiate_momentum_rows(const TokenRows<Real>& x, const TokenRows<Real>& d_x,
                                            const MomentumGates<Real>& gates,
                                            MomentumGates<double>& d_gates, std::int64_t stride,
                                            const Real* state_before, const Real* state_after,
                                            const Real* momentum_before, const Real* momentum_after,
                                            const Real* errors, const Real* d_outputs,
                                            Real* d_state, Real* d_momentum, Real* d_values) {
  const Tag<Real> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  const auto beta = hn::Set(d, gates.beta);
  const auto decay = hn::Set(d, gates.decay);
  const auto mu = hn::Set(d, gates.mu);
  hn::Vec<decltype(d)> d_output[kSliceRows], write[kSliceRows], k_sum[kSliceRows];
  auto beta_sum = hn::Zero(d);
  auto mu_sum = hn::Zero(d);
  auto decay_sum = hn::Zero(d);
  for (int r = 0; r < kSliceRows; ++r) {
    d_output[r] = hn::Set(d, d_outputs[r]);
    write[r] = hn::Set(d, gates.eta * errors[r]);
    k_sum[r] = hn::Zero(d);
  }
  for (std::int64_t c = 0; c < stride; c += kLanes) {
    const auto q = hn::Load(d, x.q + c);
    const auto k = hn::Load(d, x.k + c);
    auto d_q = hn::Load(d, d_x.q + c);
    auto d_k = hn::Load(d, d_x.k + c);
#pragma GCC unroll 4
    for (int r = 0; r < kSliceRows; ++r) {
      const std::int64_t at = r * stride + c;
      const auto ds = hn::MulAdd(q, d_output[r], hn::Load(d, d_state + at));
      d_q = hn::MulAdd(hn::Load(d, state_after + at), d_output[r], d_q);
      const auto dm = hn::MulAdd(beta, ds, hn::Load(d, d_momentum + at));
      beta_sum = hn::MulAdd(ds, hn::Load(d, momentum_after + at), beta_sum);
      decay_sum = hn::MulAdd(ds, hn::Load(d, state_before + at), decay_sum);
      mu_sum = hn::MulAdd(dm, hn::Load(d, momentum_before + at), mu_sum);
      d_k = hn::MulAdd(dm, write[r], d_k);
      k_sum[r] = hn::MulAdd(dm, k, k_sum[r]);
      hn::Store(hn::Mul(decay, ds), d, d_state + at);
      hn::Store(hn::Mul(mu, dm), d, d_momentum + at);
    }
    hn::Store(d_q, d, d_x.q + c);
    hn::Store(d_k, d, d_x.k + c);
  }
  Real d_write[kSliceRows];
  sum_lanes(d, k_sum, d_write);
  d_gates.beta += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, beta_sum)));
  d_gates.decay += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, decay_sum)));
  d_gates.mu += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, mu_sum)));
  hn::Vec<decltype(d)> d_read[kSliceRows];
  for (int r = 0; r < kSliceRows; ++r) {
    d_gates.eta += static_cast<double>(d_write[r]) * static_cast<double>(errors[r]);
    d_values[r] = gates.eta * d_write[r];
    d_read[r] = hn::Set(d, -d_values[r]);
  }
  for (std::int64_t c = 0; c < stride; c += kLanes) {
    const auto p = hn::Load(d, x.a + c);
    auto d_p = hn::Load(d, d_x.a + c);
#pragma GCC unroll 4
    for (int r = 0; r < kSliceRows; ++r) {
      const std::int64_t at = r * stride + c;
      d_p = hn::MulAdd(hn::Load(d, state_before + at), d_read[r], d_p);
      hn::Store(hn::MulAdd(p, d_read[r], hn::Load(d, d_state + at)), d, d_state + at);
    }
    hn::Store(d_p, d, d_x.a + c);
  }
}

template <class Real>
void load_momentum_chunk(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                         const Head& head, std::int64_t begin, std::int64_t count,
                         MomentumBackwardScratch<Real>& s) {
  auto& base = s.base;
  const std::int64_t values = params.shape.V;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t t = head.sequence.begin + begin + i;
    const auto x = base.of(base.rows, i);
    load_momentum_rows(params, head, t, x.q, x.k, x.a);
    const auto index = static_cast<std::size_t>(i);
    s.gates[index] = load_momentum_gates(params, head, t);
    s.d_gates[index] = {0, 0, 0, 0};
    load_row<Real>(params.v.at(head.sequence.batch, t, head.value_head), params.v.dtype, values,
                   base.values.data() + i * base.value_stride);
    if (gradients.d_o) {
      load_row<Real>(gradients.d_o.at(head.sequence.batch, t, head.value_head), gradients.d_o.dtype,
                     values, base.d_outputs.data() + i * base.value_stride);
    }
  }
  std::fill_n(base.d_rows.data(), kTokenRows * base.distance * base.key_stride, Real{0});
}

template <class Real>
HWY_NOINLINE void advance_momentum(std::int64_t count, MomentumBackwardScratch<Real>& s) {
  auto& base = s.base;
  for (std::int64_t row = 0; row < base.value_stride; row += kSliceRows) {
    Real* state = base.state.data() + row * base.key_stride;
    Real* momentum = s.momentum.data() + row * base.key_stride;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = i * base.value_stride + row;
      step_momentum_rows(base.of(base.rows, i), s.gates[static_cast<std::size_t>(i)],
                         base.key_stride, state, momentum, state, momentum, base.values.data() + at,
                         base.reads.data() + at);
    }
  }
}

template <class Real>
HWY_NOINLINE void differentiate_momentum_chunk(std::int64_t count, std::int64_t chunk,
                                               MomentumBackwardScratch<Real>& s) {
  auto& base = s.base;
  const std::int64_t stride = base.key_stride;
  const std::int64_t size = kSliceRows * stride;
  for (std::int64_t row = 0; row < base.value_stride; row += kSliceRows) {
    std::copy_n(base.checkpoint(chunk) + row * stride, size, base.slice.data());
    std::copy_n(s.checkpoint(chunk) + row * stride, size, s.slice.data());
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = i * base.value_stride + row;
      Real* state = base.slice.data() + i * size;
      Real* momentum = s.slice.data() + i * size;
      step_momentum_rows(base.of(base.rows, i), s.gates[static_cast<std::size_t>(i)], stride, state,
                         momentum, state + size, momentum + size, base.values.data() + at,
                         base.reads.data() + at);
    }
    for (std::int64_t i = count - 1; i >= 0; --i) {
      const auto index = static_cast<std::size_t>(i);
      const std::int64_t at = i * base.value_stride + row;
      const Real* state = base.slice.data() + i * size;
      const Real* momentum = s.slice.data() + i * size;
      differentiate_momentum_rows(base.of(base.rows, i), base.of(base.d_rows, i), s.gates[index],
                                  s.d_gates[index], stride, state, state + size, momentum,
                                  momentum + size, base.reads.data() + at,
                                  base.d_outputs.data() + at, base.d_state.data() + row * stride,
                                  s.d_momentum.data() + row * stride, base.d_values.data() + at);
    }
  }
}

template <class Real>
void store_momentum_gradients(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                              const Head& head, std::int64_t begin, std::int64_t count,
                              bool first_head, bool last_head, MomentumBackwardScratch<Real>& s) {
  auto& base = s.base;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto index = static_cast<std::size_t>(i);
    const std::int64_t t = head.sequence.begin + begin + i;
    const auto sum = base.sum(begin + i, i);
    if (first_head) {
      for (Real* row : {sum.q, sum.k, sum.a}) std::fill_n(row, base.keys, Real{0});
    }
    const auto d_x = base.of(base.d_rows, i);
    store_row(base.d_values.data() + i * base.value_stride, params.shape.V,
              gradients.d_v.at(head.sequence.batch, t, head.value_head), gradients.d_v.dtype);
    add_scaled_row(d_x.q, static_cast<Real>(params.scale), base.keys, sum.q);
    add_scaled_row(d_x.k, Real{1}, base.keys, sum.k);
    add_scaled_row(d_x.a, Real{1}, base.keys, params.p ? sum.a : sum.k);
    const auto& d = s.d_gates[index];
    const double d_g = d.decay * static_cast<double>(s.gates[index].decay);
    store_gate_gradient(gradients.d_g, head, t, static_cast<Real>(d_g));
    store_gate_gradient(gradients.d_beta, head, t, static_cast<Real>(d.beta));
    store_gate_gradient(gradients.d_mu, head, t, static_cast<Real>(d.mu));
    store_gate_gradient(gradients.d_eta, head, t, static_cast<Real>(d.eta));
    if (!last_head) continue;
    differentiate_norm(params, params.q, head, t, sum.q);
    differentiate_norm(params, params.k, head, t, sum.k);
    store_key_gradient(gradients.d_q, head, t, base.keys, sum.q);
    store_key_gradient(gradients.d_k, head, t, base.keys, sum.k);
    store_key_gradient(gradients.d_p, head, t, base.keys, sum.a);
  }
}

template <class Real>
void momentum_backward_key_head(const RuleParams<Real>& params,
                                const RuleGradients<Real>& gradients, std::int64_t n,
                                std::int64_t key_head) {
  const Shape& shape = params.shape;
  const std::int64_t tokens = params.sequence(n).length;
  const std::int64_t group = params.value_heads_per_key_head();
  MomentumBackwardScratch<Real> s(params, tokens);
  auto& base = s.base;
  const std::int64_t state_size = base.value_stride * base.key_stride;
  const auto at = [](const Real* states, std::int64_t offset) {
    return states != nullptr ? states + offset : nullptr;
  };
  for (std::int64_t member = 0; member < group; ++member) {
    const Head head = head_of(params, n, key_head * group + member);
    const std::int64_t offset = params.state_offset(n, head.value_head);
    const auto load = [&](const Real* states, AlignedBuffer<Real>& out) {
      load_transposed_state(at(states, offset), shape, base.key_stride, out.data());
    };
    load(params.initial_state, base.state);
    load(params.initial_momentum, s.momentum);
    load(gradients.d_final_state, base.d_state);
    load(gradients.d_final_momentum, s.d_momentum);
    for (std::int64_t chunk = 0; chunk < base.checkpoints; ++chunk) {
      std::copy_n(base.state.data(), state_size, base.checkpoint(chunk));
      std::copy_n(s.momentum.data(), state_size, s.checkpoint(chunk));
      if (chunk + 1 == base.checkpoints) break;
      load_momentum_chunk(params, gradients, head, chunk * base.distance, base.distance, s);
      advance_momentum(base.distance, s);
    }
    for (std::int64_t chunk = base.checkpoints - 1; chunk >= 0; --chunk) {
      const std::int64_t begin = chunk * base.distance;
      const std::int64_t count = std::min(base.distance, tokens - begin);
      load_momentum_chunk(params, gradients, head, begin, count, s);
      differentiate_momentum_chunk(count, chunk, s);
      store_momentum_gradients(params, gradients, head, begin, count, member == 0,
                               member + 1 == group, s);
    }
    if (gradients.d_initial_state != nullptr) {
      store_transposed_state(base.d_state.data(), shape, base.key_stride,
                             gradients.d_initial_state + offset);
    }
    if (gradients.d_initial_momentum != nullptr) {
      store_transposed_state(s.d_momentum.data(), shape, base.key_stride,
                             gradients.d_initial_momentum + offset);
    }
  }
}

/// Gradients of the rule, in parallel over sequences and key heads.
template <class Real>
void momentum_backward(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                       const Executor& executor) {
  executor.run(params.sequences() * params.shape.H, [&](std::int64_t task) {
    momentum_backward_key_head(params, gradients, task / params.shape.H, task % params.shape.H);
  });
}

template <class Real>
RuleForms<Real> momentum_forms() {
  return {&momentum_forward<Real>, &momentum_recurrent<Real>, &momentum_backward<Real>};
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
