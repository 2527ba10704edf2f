// What a backward pass that goes token by token needs: the transposed state, whose rows (one for
// each value channel) never meet, and the states that it keeps.
// Per-target include guard.
#if defined(FASTWEIGHTS_CORE_TOKEN_BACKWARD_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_TOKEN_BACKWARD_INL_HPP_
#undef FASTWEIGHTS_CORE_TOKEN_BACKWARD_INL_HPP_
#else
#define FASTWEIGHTS_CORE_TOKEN_BACKWARD_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/dplr-inl.hpp"
#include "fastweights/core/row_gradients-inl.hpp"

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

/// Scratch of one key head's backward pass, token by token. State rows lie transposed, [V rounded
/// up, key_stride].
template <class Real>
struct TokenBackwardScratch {
  TokenBackwardScratch(const RuleParams<Real>& params, std::int64_t tokens)
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

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
