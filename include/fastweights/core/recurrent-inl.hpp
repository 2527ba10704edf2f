// The recurrent form of the (gated) delta rule, on the state in place: one token, or a few at once.
// Per-target include guard.
#if defined(FASTWEIGHTS_CORE_RECURRENT_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_RECURRENT_INL_HPP_
#undef FASTWEIGHTS_CORE_RECURRENT_INL_HPP_
#else
#define FASTWEIGHTS_CORE_RECURRENT_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "fastweights/core/chunkwise-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// Vectors of columns that one pass over the state keeps in registers: whole rows where they fit,
/// since a state is best read in the order in which it lies.
inline constexpr int kRecurrentVectors = 4 * kPanelVectors;

/// Tokens that share one pass over the state.
inline constexpr int kFew = 4;

/// One token, as the recurrence sees it; rows are of type `Real`.
template <class Real>
struct Token {
  const Real* q;
  const Real* k;
  Real decay;
  Real beta;
  Real qk;  // q · k
};

/// One token on `kVectors` vectors of columns: the reads and the write cross the state once each.
template <int kVectors, class D, class Real, class Stored>
HWY_INLINE void step_columns(D d, const Token<Real>& token, std::int64_t keys, std::int64_t values,
                             const Real* HWY_RESTRICT v, Stored* HWY_RESTRICT state,
                             Real* HWY_RESTRICT out) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<D> read_k[kVectors];
  hn::Vec<D> read_q[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) read_k[j] = read_q[j] = hn::Zero(d);
  const Stored* row = state;
  for (std::int64_t r = 0; r < keys; ++r, row += values) {
    const auto k = hn::Set(d, token.k[r]);
    const auto q = hn::Set(d, token.q[r]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const auto s = load_stored(d, row + j * lanes);
      read_k[j] = hn::MulAdd(k, s, read_k[j]);
      read_q[j] = hn::MulAdd(q, s, read_q[j]);
    }
  }
  const auto decay = hn::Set(d, token.decay);
  hn::Vec<D> write[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const auto error = hn::NegMulAdd(decay, read_k[j], hn::LoadU(d, v + j * lanes));
    write[j] = hn::Mul(hn::Set(d, token.beta), error);
    const auto read = hn::Mul(decay, read_q[j]);
    hn::StoreU(hn::MulAdd(hn::Set(d, token.qk), write[j], read), d, out + j * lanes);
  }
  // From the end: the last rows read are still in the nearest cache.
  Stored* target = state + (keys - 1) * values;
  for (std::int64_t r = keys - 1; r >= 0; --r, target -= values) {
    const auto k = hn::Set(d, token.k[r]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const auto s = hn::Mul(decay, load_stored(d, target + j * lanes));
      store_stored(hn::MulAdd(k, write[j], s), d, target + j * lanes);
    }
  }
}

/// One token on all columns of one head's state.
template <class Real, class Stored>
void step_token(const Token<Real>& token, std::int64_t keys, std::int64_t values, const Real* v,
                Stored* state, Real* out) {
  const Tag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t column = 0;
  for (; column + kRecurrentVectors * lanes <= values; column += kRecurrentVectors * lanes) {
    step_columns<kRecurrentVectors>(d, token, keys, values, v + column, state + column,
                                    out + column);
  }
  for (; column + lanes <= values; column += lanes) {
    step_columns<1>(d, token, keys, values, v + column, state + column, out + column);
  }
  const hn::CappedTag<Real, 1> one;
  for (; column < values; ++column) {
    step_columns<1>(one, token, keys, values, v + column, state + column, out + column);
  }
}

/// Packed rows of a few tokens of one head, and what those tokens do to each other.
template <class Real>
struct FewTokens {
  FewTokens() : rows(static_cast<std::size_t>(2 * kFew * kRowStride<Real>)) {}
  AlignedBuffer<Real> rows;  // [2 kFew, kRowStride]: keys, then queries, as many as there are
  ChunkCoefficients<Real> coefficients;
};

/// Packs `kTokens` tokens of a head, from token `begin` of its sequence on.
template <int kTokens, class Real>
void pack_few(const RuleParams<Real>& params, const Head& head, std::int64_t begin,
              FewTokens<Real>& few) {
  const std::int64_t padded =
      round_up(params.shape.K, static_cast<std::int64_t>(hn::MaxLanes(Tag<Real>())));
  const auto scale = static_cast<Real>(params.scale);
  auto& c = few.coefficients;
  Real decay[kTokens];
  for (int i = 0; i < kTokens; ++i) {
    const std::int64_t token = head.sequence.begin + begin + i;
    Real* key = few.rows.data() + i * kRowStride<Real>;
    load_feature_row(params, params.k, Real{1}, head, token, padded, key);
    load_feature_row(params, params.q, scale, head, token, padded,
                     key + kTokens * kRowStride<Real>);
    c.beta[i] = load_gate<Real>(params.beta, head, token);
    decay[i] = decay_of(params, head, token);
  }
  for (int j = 0; j < kTokens; ++j) {
    Vector<Real> sums[2 * kFew];
    alignas(64) Real dots[2 * kFew];
    std::fill(sums, sums + 2 * kFew, hn::Zero(Tag<Real>()));
    add_dots<2 * kTokens>(few.rows.data() + j * kRowStride<Real>, few.rows.data(), padded, sums);
    sum_each(Tag<Real>(), sums, 2 * kFew, dots);
    for (int i = j; i < kTokens; ++i) {
      c.kk[i][j] = dots[i];
      c.qk[i][j] = dots[kTokens + i];
    }
  }
  decay_pairs<kTokens>(decay, c);
}

/// `kTokens` tokens on one panel of the state, whose rows are `state_stride` apart.
template <int kTokens, class Real>
HWY_INLINE void step_few(const FewTokens<Real>& few, std::int64_t keys, const ChunkRows<Real>& rows,
                         Real* state, std::int64_t state_stride, RowPrefetch<Real>& prefetch) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  const auto& c = few.coefficients;
  Vector<Real> reads[2 * kTokens][kPanelVectors];  // of the keys, of the queries
  Vector<Real> writes[kTokens][kPanelVectors];
  read_state(state, state_stride, few.rows.data(), keys, prefetch, reads);
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      const auto value = hn::LoadU(d, rows.values + i * rows.value_stride + j * kLanes);
      auto error = hn::NegMulAdd(hn::Set(d, c.from_start[i]), reads[i][j], value);
#pragma GCC unroll 4
      for (int before = 0; before < i; ++before) {
        error = hn::NegMulAdd(hn::Set(d, c.kk[i][before]), writes[before][j], error);
      }
      writes[i][j] = hn::Mul(hn::Set(d, c.beta[i]), error);
      auto output = hn::Mul(hn::Set(d, c.from_start[i]), reads[kTokens + i][j]);
#pragma GCC unroll 4
      for (int before = 0; before <= i; ++before) {
        output = hn::MulAdd(hn::Set(d, c.qk[i][before]), writes[before][j], output);
      }
      hn::StoreU(output, d, rows.outputs + i * rows.output_stride + j * kLanes);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      writes[i][j] = hn::Mul(hn::Set(d, c.to_end[i]), writes[i][j]);
    }
  }
  const auto factor = hn::Set(d, c.factor);
  const auto decay = [factor](std::int64_t, Vector<Real> row)
                         HWY_ATTR { return hn::Mul(factor, row); };
  write_state(state, state_stride, few.rows.data(), keys, decay, writes);
}

/// Calls `visit` with the constant that `count` is, in [1, kFew].
template <class Visit>
HWY_INLINE void with_count(std::int64_t count, const Visit& visit) {
  static_assert(kFew == 4);
  switch (count) {
    case 1: return visit(std::integral_constant<int, 1>());
    case 2: return visit(std::integral_constant<int, 2>());
    case 3: return visit(std::integral_constant<int, 3>());
    default: return visit(std::integral_constant<int, 4>());
  }
}

/// Walks one head's sequence a few tokens at a time: the state crosses the caches once for every
/// `kBlock` tokens. V is a multiple of `kPanel`.
template <class Real>
void walk_in_place(const RuleParams<Real>& params, const Head& head, Real* state) {
  constexpr std::int64_t kGroups = kBlock / kFew;
  const Shape& shape = params.shape;
  TokenBlock<Real> rows(shape);
  RowPrefetch<Real> prefetch;  // aims at nothing
  const std::int64_t length = head.sequence.length;
  std::vector<FewTokens<Real>> few(
      static_cast<std::size_t>(std::min(kGroups, (length + kFew - 1) / kFew)));
  for (std::int64_t begin = 0; begin < length; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, length - begin);
    // Of about the same size: a group of one costs nearly as much as one of two.
    const std::int64_t groups = (count + kFew - 1) / kFew;
    const auto first_of = [&](std::int64_t i) { return i * count / groups; };
    const auto size_of_group = [&](std::int64_t i) { return first_of(i + 1) - first_of(i); };
    rows.load(params, head, begin, count);
    for (std::int64_t i = 0; i < groups; ++i) {
      with_count(size_of_group(i), [&](auto tokens) {
        pack_few<tokens>(params, head, begin + first_of(i), few[static_cast<std::size_t>(i)]);
      });
    }
    for (std::int64_t column = 0; column < shape.V; column += kPanel<Real>) {
      for (std::int64_t i = 0; i < groups; ++i) {
        const FewTokens<Real>& group = few[static_cast<std::size_t>(i)];
        const ChunkRows<Real> chunk{
            rows.values + first_of(i) * rows.value_stride + column, rows.value_stride,
            rows.outputs + first_of(i) * rows.output_stride + column, rows.output_stride};
        with_count(size_of_group(i), [&](auto tokens) HWY_ATTR {
          step_few<tokens>(group, shape.K, chunk, state + column, shape.V, prefetch);
        });
      }
    }
    rows.store(params, head, begin, count, 0, shape.V);
  }
}

/// Walks one head's sequence token by token; a state in bf16 is rounded after each.
template <class Real, class Stored>
void walk_tokens(const RuleParams<Real>& params, const Head& head, Stored* state) {
  const Shape& shape = params.shape;
  alignas(64) Real k[kMaxHeadSize];
  alignas(64) Real q[kMaxHeadSize];
  alignas(64) Real v[kMaxHeadSize];
  alignas(64) Real out[kMaxHeadSize];
  const auto batch = head.sequence.batch;
  for (std::int64_t i = 0; i < head.sequence.length; ++i) {
    const std::int64_t t = head.sequence.begin + i;
    load_feature_row(params, params.k, Real{1}, head, t, shape.K, k);
    load_feature_row(params, params.q, static_cast<Real>(params.scale), head, t, shape.K, q);
    load_row<Real>(params.v.at(batch, t, head.value_head), params.v.dtype, shape.V, v);
    const Token<Real> token{q, k, decay_of(params, head, t), load_gate<Real>(params.beta, head, t),
                            dot(q, k, shape.K)};
    step_token(token, shape.K, shape.V, v, state, out);
    store_row(out, shape.V, params.o.at(batch, t, head.value_head), params.o.dtype);
  }
}

/// One head's sequence, on its state in place.
template <class Real>
void recurrent_head(const RuleParams<Real>& params, std::int64_t n, std::int64_t value_head) {
  const Head head = head_of(params, n, value_head);
  const std::int64_t offset = params.state_offset(n, value_head);
  if constexpr (std::is_same_v<Real, float>) {
    // One token crosses a narrow state as it lies: a copy would cross the caches twice more.
    if (params.narrow_state != nullptr && head.sequence.length == 1) {
      return walk_tokens(params, head, params.narrow_state + offset);
    }
  }
  const WorkingState<Real> state(params.initial_state, params.final_state, params.narrow_state,
                                 offset, params.shape);
  if (head.sequence.length > 1 && params.shape.V % kPanel<Real> == 0) {
    walk_in_place(params, head, state.data());
  } else {
    walk_tokens(params, head, state.data());
  }
}

/// The recurrent form over all heads. One of `final_state` and `narrow_state` must not be null.
template <class Real>
void recurrent(const RuleParams<Real>& params, const Executor& executor) {
  const std::int64_t heads = params.sequences() * params.shape.HV;
  executor.run(heads, [&](std::int64_t task) {
    recurrent_head(params, task / params.shape.HV, task % params.shape.HV);
  });
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
