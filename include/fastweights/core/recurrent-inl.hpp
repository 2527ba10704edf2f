// The recurrent form of the (gated) delta rule: token by token, on the state in place.
// Per-target include guard.
#if defined(FASTWEIGHTS_CORE_RECURRENT_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_RECURRENT_INL_HPP_
#undef FASTWEIGHTS_CORE_RECURRENT_INL_HPP_
#else
#define FASTWEIGHTS_CORE_RECURRENT_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fastweights/core/chunkwise-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// Vectors of columns that one pass over the state keeps in registers.
inline constexpr int kRecurrentVectors = 4;

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
template <int kVectors, class D, class Real>
HWY_INLINE void step_columns(D d, const Token<Real>& token, std::int64_t keys, std::int64_t values,
                             const Real* HWY_RESTRICT v, Real* HWY_RESTRICT state,
                             Real* HWY_RESTRICT out) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<D> read_k[kVectors];
  hn::Vec<D> read_q[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) read_k[j] = read_q[j] = hn::Zero(d);
  const Real* row = state;
  for (std::int64_t r = 0; r < keys; ++r, row += values) {
    const auto k = hn::Set(d, token.k[r]);
    const auto q = hn::Set(d, token.q[r]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const auto s = hn::LoadU(d, row + j * lanes);
      read_k[j] = hn::MulAdd(k, s, read_k[j]);
      read_q[j] = hn::MulAdd(q, s, read_q[j]);
    }
  }
  const auto decay = hn::Set(d, token.decay);
  hn::Vec<D> write[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const auto error = hn::NegMulAdd(decay, read_k[j], hn::LoadU(d, v + j * lanes));
    write[j] = hn::Mul(hn::Set(d, token.beta), error);
    const auto read = hn::Mul(decay, read_q[j]);
    hn::StoreU(hn::MulAdd(hn::Set(d, token.qk), write[j], read), d, out + j * lanes);
  }
  Real* target = state;
  for (std::int64_t r = 0; r < keys; ++r, target += values) {
    const auto k = hn::Set(d, token.k[r]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const auto s = hn::Mul(decay, hn::LoadU(d, target + j * lanes));
      hn::StoreU(hn::MulAdd(k, write[j], s), d, target + j * lanes);
    }
  }
}

/// One token on all columns of one head's state.
template <class Real>
void step_token(const Token<Real>& token, std::int64_t keys, std::int64_t values, const Real* v,
                Real* state, Real* out) {
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

/// Walks one head's sequence, with its state at `params.final_state`.
template <class Real>
void recurrent_head(const RuleParams<Real>& params, std::int64_t n, std::int64_t value_head) {
  const Shape& shape = params.shape;
  const Head head{params.sequence(n), value_head / params.value_heads_per_key_head(), value_head};
  const std::int64_t offset = params.state_offset(n, value_head);
  Real* state = params.final_state + offset;
  if (params.initial_state == nullptr) {
    std::fill_n(state, shape.K * shape.V, Real{0});
  } else if (params.initial_state != params.final_state) {
    std::copy_n(params.initial_state + offset, shape.K * shape.V, state);
  }
  alignas(64) Real k[kMaxHeadSize];
  alignas(64) Real q[kMaxHeadSize];
  alignas(64) Real v[kMaxHeadSize];
  alignas(64) Real out[kMaxHeadSize];
  const auto batch = head.sequence.batch;
  for (std::int64_t i = 0; i < head.sequence.length; ++i) {
    const std::int64_t t = head.sequence.begin + i;
    load_feature_row(params, params.k, Real{1}, head, t, shape.K, k);
    load_feature_row(params, params.q, static_cast<Real>(params.scale), head, t, shape.K, q);
    load_row<Real>(params.v.at(batch, t, value_head), params.v.dtype, shape.V, v);
    const Real beta = load_scalar<Real>(params.beta.at(batch, t, value_head), params.beta.dtype);
    const Token<Real> token{q, k, decay_of<Real>(params, head, t), beta, dot(q, k, shape.K)};
    step_token(token, shape.K, shape.V, v, state, out);
    store_row(out, shape.V, params.o.at(batch, t, value_head), params.o.dtype);
  }
}

/// The recurrent form over all heads. `params.final_state` must not be null.
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
