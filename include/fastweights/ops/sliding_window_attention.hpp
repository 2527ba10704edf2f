#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace fastweights {

/// Sizes and constants of `sliding_window_attention`.
struct SlidingWindowAttentionParams {
  int64_t heads = 1;
  int64_t window = 128;        ///< a token attends to itself and the window − 1 tokens before it
  double rope_base = 10000.0;  ///< base of the rotary frequencies
  bool in_place = false;       ///< inference only: the caches given are overwritten
};

/// Rotary position embedding (arXiv:2104.09864) of the first half of each head's D dimensions:
/// dimensions i and i + D/4 are turned by `position · base^(−4i/D)`. Angles are formed in fp64.
/// @param x        [B, T, heads·D], D a multiple of 4
/// @param position int64 [B], index of each row's first token
/// @throws ShapeError if the shapes disagree
at::Tensor rotary_embedding(const at::Tensor& x, const at::Tensor& position, int64_t heads,
                            double base = 10000.0);

/// Causal attention over a sliding window, with learned sinks (arXiv:2309.17453) and partial rotary
/// position embedding (arXiv:2104.09864): the first D/2 dimensions of queries and keys are rotated
/// by the absolute position (angles in fp64, so they are exact at 10^7 tokens), pairing dimension i
/// with i + D/4. Sink keys live in the other half, so their scores do not depend on the position.
/// @param query, key, value [B, T, heads·D], projected; D a multiple of 4
/// @param sink_key          [heads, S, D/2]
/// @param sink_value        [heads, S, D]
/// @param cache_key, cache_value ring [B, window, heads, D] of rotated keys and of values: the
/// token
///        with index i stands in slot i % window; empty unless given
/// @param position          int64 [B], tokens seen so far; a row at 0 does not see what its ring
/// holds
/// @return o [B, T, heads·D] and both caches after the last token. Cost and memory are linear in T.
/// @throws ShapeError naming the tensor, the expected and the given shape
std::tuple<at::Tensor, at::Tensor, at::Tensor> sliding_window_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& sink_key, const at::Tensor& sink_value,
    const std::optional<at::Tensor>& cache_key, const std::optional<at::Tensor>& cache_value,
    const at::Tensor& position, const SlidingWindowAttentionParams& params);

}  // namespace fastweights
