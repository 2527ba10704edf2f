// Gradients of the rules of dplr-inl.hpp: token by token, on the transposed state, whose rows (one
// for each value channel) never meet. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_DPLR_BACKWARD_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_DPLR_BACKWARD_INL_HPP_
#undef FASTWEIGHTS_CORE_DPLR_BACKWARD_INL_HPP_
#else
#define FASTWEIGHTS_CORE_DPLR_BACKWARD_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fastweights/core/dplr-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// Rows of the transposed state that are walked together: they share each load of a key or query.
inline constexpr int kSliceRows = 4;

/// Tokens between two states that the backward pass keeps: about the root of the length, so that
/// the states kept and those recomputed between two of them grow alike.
inline std::int64_t checkpoint_distance(std::int64_t tokens) {
  const auto root = static_cast<std::int64_t>(std::sqrt(static_cast<double>(tokens)));
  return std::max<std::int64_t>(32, root);
}

/// Where the gradients of a key head's rows are summed over the value heads that read it.
template <class Real>
struct KeyHeadGradients {
  Real* q;
  Real* k;
  Real* a;
  Real* b;
};

/// Scratch of one key head's backward pass. State rows lie transposed, [V rounded up, key_stride].
template <class Real>
struct DplrBackwardScratch {
  DplrBackwardScratch(const RuleParams<Real>& params, std::int64_t tokens)
      : keys(params.shape.K),
        key_stride(round_up(keys, static_cast<std::int64_t>(hn::MaxLanes(Tag<Real>())))),
        value_stride(round_up(params.shape.V, kSliceRows)),
        distance(checkpoint_distance(tokens)),
        checkpoints((tokens + distance - 1) / distance),
        shared(params.value_heads_per_key_head() > 1),
        summed_tokens(shared ? tokens : std::min(tokens, distance)),
        rows(zeros(kTokenRows * distance * key_stride)),
        d_rows(zeros(kTokenRows * distance * key_stride)),
        sums(zeros(4 * summed_tokens * key_stride)),
        values(zeros(distance * value_stride)),
        d_outputs(zeros(distance * value_stride)),
        reads(zeros(distance * value_stride)),
        d_values(zeros(distance * value_stride)),
        state(zeros(value_stride * key_stride)),
        d_state(zeros(value_stride * key_stride)),
        states(zeros(checkpoints * value_stride * key_stride)),
        slice((distance + 1) * kSliceRows * key_stride) {}

  static AlignedBuffer<Real> zeros(std::int64_t size) {
    AlignedBuffer<Real> buffer(static_cast<std::size_t>(size));
    std::fill_n(buffer.data(), size, Real{0});
    return buffer;
  }

  TokenRows<Real> of(AlignedBuffer<Real>& buffer, std::int64_t i) const {
    Real* first = buffer.data() + i * key_stride;
    const std::int64_t step = distance * key_stride;
    return token_rows(first, step);
  }
  KeyHeadGradients<Real> sum(std::int64_t token, std::int64_t in_chunk) {
    Real* first = sums.data() + (shared ? token : in_chunk) * key_stride;
    const std::int64_t step = summed_tokens * key_stride;
    return {first, first + step, first + 2 * step, first + 3 * step};
  }
  Real* checkpoint(std::int64_t chunk) { return states.data() + chunk * value_stride * key_stride; }

  std::int64_t keys;
  std::int64_t key_stride;
  std::int64_t value_stride;
  std::int64_t distance;
  std::int64_t checkpoints;
  bool shared;
  std::int64_t summed_tokens;
  AlignedBuffer<Real> rows;       // [kTokenRows, tokens, key_stride] of the chunk
  AlignedBuffer<Real> d_rows;     // their gradients
  AlignedBuffer<Real> sums;       // [q k a b, tokens, key_stride]: KeyHeadGradients
  AlignedBuffer<Real> values;     // [tokens, value_stride]
  AlignedBuffer<Real> d_outputs;  // [tokens, value_stride]
  AlignedBuffer<Real> reads;      // [tokens, value_stride]: Sᵀa
  AlignedBuffer<Real> d_values;   // [tokens, value_stride]
  AlignedBuffer<Real> state;      // [V, K]
  AlignedBuffer<Real> d_state;    // [V, K]
  AlignedBuffer<Real> states;     // [checkpoints, V, K]: before each chunk
  AlignedBuffer<Real> slice;      // [tokens + 1, kSliceRows, K]: the states within a chunk
};

/// Sums of kSliceRows vectors, each over its lanes.
template <class D, class Real>
HWY_INLINE void sum_lanes(D d, const hn::Vec<D> (&sums)[kSliceRows], Real (&out)[kSliceRows]) {
#pragma GCC unroll 4
  for (int r = 0; r < kSliceRows; ++r) out[r] = hn::GetLane(hn::SumOfLanes(d, sums[r]));
}

/// What is written with k: v for the rules without a correction of their own, v − Sᵀa for the delta
/// write.
template <Correction kCorrection, class Real>
HWY_INLINE Real written(Real value, Real read) {
  return kCorrection == Correction::kDelta ? value - read : value;
}

/// One token forward on kSliceRows rows: from `in` to `out` (which may be `in`); keeps the reads.
template <Correction kCorrection, class Real>
HWY_INLINE void step_rows(const TokenRows<Real>& x, std::int64_t stride, const Real* in, Real* out,
                          const Real* values, Real* reads) {
  const Tag<Real> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  Real read[kSliceRows] = {};
  if constexpr (kCorrection != Correction::kNone) {
    hn::Vec<decltype(d)> sum[kSliceRows];
    for (int r = 0; r < kSliceRows; ++r) sum[r] = hn::Zero(d);
    for (std::int64_t c = 0; c < stride; c += kLanes) {
      const auto a = hn::Load(d, x.a + c);
#pragma GCC unroll 4
      for (int r = 0; r < kSliceRows; ++r) {
        sum[r] = hn::MulAdd(a, hn::Load(d, in + r * stride + c), sum[r]);
      }
    }
    sum_lanes(d, sum, read);
  }
  hn::Vec<decltype(d)> write[kSliceRows], second[kSliceRows];
  for (int r = 0; r < kSliceRows; ++r) {
    reads[r] = read[r];
    write[r] = hn::Set(d, written<kCorrection>(values[r], read[r]));
    second[r] = hn::Set(d, read[r]);
  }
  for (std::int64_t c = 0; c < stride; c += kLanes) {
    const auto decay = hn::Load(d, x.decay + c);
    const auto k = hn::Load(d, x.k + c);
#pragma GCC unroll 4
    for (int r = 0; r < kSliceRows; ++r) {
      auto s = hn::MulAdd(k, write[r], hn::Mul(decay, hn::Load(d, in + r * stride + c)));
      if constexpr (kCorrection == Correction::kGeneral) {
        s = hn::MulAdd(hn::Load(d, x.b + c), second[r], s);
      }
      hn::Store(s, d, out + r * stride + c);
    }
  }
}

/// One token backward on kSliceRows rows, from the states before and after it. `d_state` goes from
/// after the token to before it; the gradients of the rows are added to `d`.
template <Correction kCorrection, class Real>
HWY_INLINE void differentiate_rows(const TokenRows<Real>& x, const TokenRows<Real>& d_x,
                                   std::int64_t stride, const Real* before, const Real* after,
                                   const Real* values, const Real* reads, const Real* d_outputs,
                                   Real* d_state, Real* d_values) {
  const Tag<Real> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  hn::Vec<decltype(d)> d_output[kSliceRows], write[kSliceRows], read[kSliceRows];
  hn::Vec<decltype(d)> k_sum[kSliceRows], b_sum[kSliceRows];
  for (int r = 0; r < kSliceRows; ++r) {
    d_output[r] = hn::Set(d, d_outputs[r]);
    write[r] = hn::Set(d, written<kCorrection>(values[r], reads[r]));
    read[r] = hn::Set(d, reads[r]);
    k_sum[r] = b_sum[r] = hn::Zero(d);
  }
  for (std::int64_t c = 0; c < stride; c += kLanes) {
    const auto q = hn::Load(d, x.q + c);
    const auto k = hn::Load(d, x.k + c);
    auto d_q = hn::Load(d, d_x.q + c);
    auto d_k = hn::Load(d, d_x.k + c);
    auto d_b = hn::Zero(d);
    if constexpr (kCorrection == Correction::kGeneral) d_b = hn::Load(d, d_x.b + c);
#pragma GCC unroll 4
    for (int r = 0; r < kSliceRows; ++r) {
      const auto ds = hn::MulAdd(q, d_output[r], hn::Load(d, d_state + r * stride + c));
      hn::Store(ds, d, d_state + r * stride + c);
      d_q = hn::MulAdd(hn::Load(d, after + r * stride + c), d_output[r], d_q);
      d_k = hn::MulAdd(ds, write[r], d_k);
      k_sum[r] = hn::MulAdd(ds, k, k_sum[r]);
      if constexpr (kCorrection == Correction::kGeneral) {
        d_b = hn::MulAdd(ds, read[r], d_b);
        b_sum[r] = hn::MulAdd(ds, hn::Load(d, x.b + c), b_sum[r]);
      }
    }
    hn::Store(d_q, d, d_x.q + c);
    hn::Store(d_k, d, d_x.k + c);
    if constexpr (kCorrection == Correction::kGeneral) hn::Store(d_b, d, d_x.b + c);
  }
  Real d_write[kSliceRows], d_second[kSliceRows];
  sum_lanes(d, k_sum, d_write);
  sum_lanes(d, b_sum, d_second);
  hn::Vec<decltype(d)> d_read[kSliceRows];
  for (int r = 0; r < kSliceRows; ++r) {
    d_values[r] = d_write[r];
    d_read[r] = hn::Set(d, kCorrection == Correction::kDelta ? -d_write[r] : d_second[r]);
  }
  for (std::int64_t c = 0; c < stride; c += kLanes) {
    const auto decay = hn::Load(d, x.decay + c);
    auto d_decay = hn::Load(d, d_x.decay + c);
    auto a = hn::Zero(d);
    auto d_a = hn::Zero(d);
    if constexpr (kCorrection != Correction::kNone) {
      a = hn::Load(d, x.a + c);
      d_a = hn::Load(d, d_x.a + c);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kSliceRows; ++r) {
      const auto ds = hn::Load(d, d_state + r * stride + c);
      const auto s = hn::Load(d, before + r * stride + c);
      d_decay = hn::MulAdd(ds, s, d_decay);
      auto d_before = hn::Mul(decay, ds);
      if constexpr (kCorrection != Correction::kNone) {
        d_a = hn::MulAdd(s, d_read[r], d_a);
        d_before = hn::MulAdd(a, d_read[r], d_before);
      }
      hn::Store(d_before, d, d_state + r * stride + c);
    }
    hn::Store(d_decay, d, d_x.decay + c);
    if constexpr (kCorrection != Correction::kNone) hn::Store(d_a, d, d_x.a + c);
  }
}

/// out ← the transpose of a [K, V] state, or zeros where there is none.
template <class Real>
void load_transposed_state(const Real* state, const Shape& shape, std::int64_t key_stride,
                           Real* out) {
  if (state == nullptr) {
    std::fill_n(out, round_up(shape.V, kSliceRows) * key_stride, Real{0});
    return;
  }
  for (std::int64_t r = 0; r < shape.K; ++r) {
    for (std::int64_t c = 0; c < shape.V; ++c) out[c * key_stride + r] = state[r * shape.V + c];
  }
}

template <class Real>
void store_transposed_state(const Real* state, const Shape& shape, std::int64_t key_stride,
                            Real* out) {
  for (std::int64_t r = 0; r < shape.K; ++r) {
    for (std::int64_t c = 0; c < shape.V; ++c) out[r * shape.V + c] = state[c * key_stride + r];
  }
}

/// Loads the rows of tokens [begin, begin + count) of a head and clears their gradients.
template <class Rule, class Real>
void load_backward_chunk(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                         const Head& head, std::int64_t begin, std::int64_t count,
                         DplrBackwardScratch<Real>& s) {
  const std::int64_t values = params.shape.V;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t t = head.sequence.begin + begin + i;
    const auto batch = head.sequence.batch;
    Rule::load(params, head, t, s.of(s.rows, i));
    load_row<Real>(params.v.at(batch, t, head.value_head), params.v.dtype, values,
                   s.values.data() + i * s.value_stride);
    if (gradients.d_o) {
      load_row<Real>(gradients.d_o.at(batch, t, head.value_head), gradients.d_o.dtype, values,
                     s.d_outputs.data() + i * s.value_stride);
    }
  }
  std::fill_n(s.d_rows.data(), kTokenRows * s.distance * s.key_stride, Real{0});
}

/// Walks the chunk's loaded rows forward on `s.state`, all rows.
template <Correction kCorrection, class Real>
HWY_NOINLINE void advance_state(std::int64_t count, DplrBackwardScratch<Real>& s) {
  for (std::int64_t row = 0; row < s.value_stride; row += kSliceRows) {
    Real* state = s.state.data() + row * s.key_stride;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = i * s.value_stride + row;
      step_rows<kCorrection>(s.of(s.rows, i), s.key_stride, state, state, s.values.data() + at,
                             s.reads.data() + at);
    }
  }
}

/// Gradients of the loaded chunk, slice of rows by slice of rows, from its first state.
template <Correction kCorrection, class Real>
HWY_NOINLINE void differentiate_chunk(std::int64_t count, const Real* first,
                                      DplrBackwardScratch<Real>& s) {
  const std::int64_t size = kSliceRows * s.key_stride;
  for (std::int64_t row = 0; row < s.value_stride; row += kSliceRows) {
    std::copy_n(first + row * s.key_stride, size, s.slice.data());
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = i * s.value_stride + row;
      Real* before = s.slice.data() + i * size;
      step_rows<kCorrection>(s.of(s.rows, i), s.key_stride, before, before + size,
                             s.values.data() + at, s.reads.data() + at);
    }
    Real* d_state = s.d_state.data() + row * s.key_stride;
    for (std::int64_t i = count - 1; i >= 0; --i) {
      const std::int64_t at = i * s.value_stride + row;
      const Real* before = s.slice.data() + i * size;
      differentiate_rows<kCorrection>(s.of(s.rows, i), s.of(s.d_rows, i), s.key_stride, before,
                                      before + size, s.values.data() + at, s.reads.data() + at,
                                      s.d_outputs.data() + at, d_state, s.d_values.data() + at);
    }
  }
}

/// Gradient of x from that of x · rsqrt(Σx² + 1e-6), in place; without the normalisation unchanged.
template <class Real>
void differentiate_norm(const RuleParams<Real>& params, const ConstView& view, const Head& head,
                        std::int64_t token, Real* gradient) {
  if (!params.use_qk_l2norm) return;
  const std::int64_t keys = params.shape.K;
  alignas(64) Real x[kMaxHeadSize];
  load_row<Real>(view.at(head.sequence.batch, token, head.key_head), view.dtype, keys, x);
  const Real norm = inverse_norm(x, keys);
  const Real along = norm * norm * dot(x, gradient, keys);
  for (std::int64_t c = 0; c < keys; ++c) gradient[c] = norm * (gradient[c] - along * x[c]);
}

template <class Real>
void store_key_gradient(const View& view, const Head& head, std::int64_t token, std::int64_t keys,
                        const Real* gradient) {
  if (!view) return;
  store_row(gradient, keys, view.at(head.sequence.batch, token, head.key_head), view.dtype);
}

template <class Real>
void store_gate_gradient(const View& view, const Head& head, std::int64_t token, Real gradient) {
  if (!view) return;
  store_row(&gradient, 1, view.at(head.sequence.batch, token, head.value_head), view.dtype);
}

/// The gradient of g from that of the decay factors, exp(g): per channel, or their sum.
template <class Real>
void store_decay_gradient(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                          const Head& head, std::int64_t token, const Real* decay, Real* d_decay) {
  if (!gradients.d_g) return;
  const std::int64_t keys = params.shape.K;
  multiply_rows(decay, d_decay, keys, d_decay);
  if (params.channel_gate) {
    store_row(d_decay, keys, gradients.d_g.at(head.sequence.batch, token, head.value_head),
              gradients.d_g.dtype);
  } else {
    double sum = 0;
    for (std::int64_t c = 0; c < keys; ++c) sum += static_cast<double>(d_decay[c]);
    store_gate_gradient(gradients.d_g, head, token, static_cast<Real>(sum));
  }
}

/// Hands the gradients of a chunk's rows to the rule and stores what is complete.
template <class Rule, class Real>
void store_chunk_gradients(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                           const Head& head, std::int64_t begin, std::int64_t count,
                           bool first_head, bool last_head, DplrBackwardScratch<Real>& s) {
  const auto scale = static_cast<Real>(params.scale);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t t = head.sequence.begin + begin + i;
    const auto sum = s.sum(begin + i, i);
    if (first_head) {
      for (Real* row : {sum.q, sum.k, sum.a, sum.b}) std::fill_n(row, s.keys, Real{0});
    }
    const auto d_x = s.of(s.d_rows, i);
    store_row(s.d_values.data() + i * s.value_stride, params.shape.V,
              gradients.d_v.at(head.sequence.batch, t, head.value_head), gradients.d_v.dtype);
    add_scaled_row(d_x.q, scale, s.keys, sum.q);
    Rule::differentiate(params, gradients, head, t, s.of(s.rows, i), d_x, sum);
    if (!last_head) continue;
    differentiate_norm(params, params.q, head, t, sum.q);
    differentiate_norm(params, params.k, head, t, sum.k);
    store_key_gradient(gradients.d_q, head, t, s.keys, sum.q);
    store_key_gradient(gradients.d_k, head, t, s.keys, sum.k);
    store_key_gradient(gradients.d_a, head, t, s.keys, sum.a);
    store_key_gradient(gradients.d_b, head, t, s.keys, sum.b);
  }
}

/// The value heads that read one key head of one sequence.
template <class Rule, class Real>
void dplr_backward_key_head(const RuleParams<Real>& params, const RuleGradients<Real>& gradients,
                            std::int64_t n, std::int64_t key_head) {
  const Shape& shape = params.shape;
  const std::int64_t tokens = params.sequence(n).length;
  const std::int64_t group = params.value_heads_per_key_head();
  DplrBackwardScratch<Real> s(params, tokens);
  const std::int64_t state_size = s.value_stride * s.key_stride;
  for (std::int64_t member = 0; member < group; ++member) {
    const Head head = head_of(params, n, key_head * group + member);
    const std::int64_t offset = params.state_offset(n, head.value_head);
    load_transposed_state(params.initial_state ? params.initial_state + offset : nullptr, shape,
                          s.key_stride, s.state.data());
    load_transposed_state(gradients.d_final_state ? gradients.d_final_state + offset : nullptr,
                          shape, s.key_stride, s.d_state.data());
    for (std::int64_t chunk = 0; chunk < s.checkpoints; ++chunk) {
      std::copy_n(s.state.data(), state_size, s.checkpoint(chunk));
      if (chunk + 1 == s.checkpoints) break;
      load_backward_chunk<Rule>(params, gradients, head, chunk * s.distance, s.distance, s);
      advance_state<Rule::kCorrection>(s.distance, s);
    }
    for (std::int64_t chunk = s.checkpoints - 1; chunk >= 0; --chunk) {
      const std::int64_t begin = chunk * s.distance;
      const std::int64_t count = std::min(s.distance, tokens - begin);
      load_backward_chunk<Rule>(params, gradients, head, begin, count, s);
      differentiate_chunk<Rule::kCorrection>(count, s.checkpoint(chunk), s);
      store_chunk_gradients<Rule>(params, gradients, head, begin, count, member == 0,
                                  member + 1 == group, s);
    }
    if (gradients.d_initial_state != nullptr) {
      store_transposed_state(s.d_state.data(), shape, s.key_stride,
                             gradients.d_initial_state + offset);
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
