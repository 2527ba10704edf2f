#pragma once

#include <cstdint>

#include "fastweights/core/array.hpp"
#include "fastweights/core/executor.hpp"

// Windowed attention with rotary position embedding and sinks on raw memory, compiled for several
// instruction sets. The arithmetic is fp64 if `query` (or `x`) is, else fp32. Results do not depend
// on the executor.

namespace fastweights::cpu {

using core::Array;
using core::ConstArray;
using core::Executor;

/// Rotates the first half of each head's dimensions by the angles position · base^(−4i/size),
/// pairing dimension i with i + size / 4; angles are formed in fp64.
struct RotaryParams {
  std::int64_t batch = 0;
  std::int64_t tokens = 0;
  std::int64_t heads = 0;
  std::int64_t size = 0;  // of a head, a multiple of 4
  double base = 10000.0;
  bool inverse = false;                    // rotates back
  const std::int64_t* position = nullptr;  // [batch], index of each row's first token
  ConstArray x;                            // [batch, tokens, heads, size]
  Array y;                                 // [batch, tokens, heads, size]
};

void rotary_embedding(const RotaryParams& params, const Executor& executor);

/// A token attends to itself, the window − 1 tokens before it and the sinks. Tokens before the
/// first come from the ring: token i of a row stands in slot i % window, and exists if i ≥ 0.
struct SlidingWindowAttentionParams {
  std::int64_t batch = 0;
  std::int64_t tokens = 0;
  std::int64_t heads = 0;
  std::int64_t size = 0;  // of a head, a multiple of 4
  std::int64_t sinks = 0;
  std::int64_t window = 1;
  double rope_base = 10000.0;
  const std::int64_t* position = nullptr;  // [batch], index of each row's first token
  ConstArray query, key, value;            // [batch, tokens, heads, size], not rotated
  ConstArray sink_key;                     // [heads, sinks, size / 2]
  ConstArray sink_value;                   // [heads, sinks, size]
  ConstArray cache_key, cache_value;       // [batch, window, heads, size], keys rotated; or null
  Array o;                                 // [batch, tokens, heads, size]
  Array log_sum;                           // [batch, heads, tokens], logarithm of the softmax's sum
};

/// Gradients; the forward call's `log_sum` is read, its `o` is not.
struct SlidingWindowAttentionGradients {
  ConstArray d_o;                    // [batch, tokens, heads, size]
  Array d_query, d_key, d_value;     // [batch, tokens, heads, size]
  Array d_sink_key, d_sink_value;    // like the sinks
  Array d_cache_key, d_cache_value;  // like the caches, or null; slots not seen are left alone
};

void sliding_window_attention(const SlidingWindowAttentionParams& params, const Executor& executor);
void sliding_window_attention_backward(const SlidingWindowAttentionParams& params,
                                       const SlidingWindowAttentionGradients& gradients,
                                       const Executor& executor);

}  // namespace fastweights::cpu
