#pragma once

#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace fastweights::nn {

/// Names and tensors in a fixed order.
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// What a FastWeightMemory carries from token to token. Undefined tensors where a model has none.
struct MemoryState {
  at::Tensor state;  ///< the fast weights [B, HV, K, V], fp32
  at::Tensor conv;   ///< the last inputs of the convolution [B, W − 1, 2·H·K + HV·V]
};

/// What a SlidingWindowAttention carries: rings in which token i stands in slot i % window.
struct AttentionState {
  at::Tensor key;    ///< rotated keys [B, window, heads, D]
  at::Tensor value;  ///< [B, window, heads, D]
};

/// The state of a Block: that of its memory and that of its attention.
struct BlockState {
  MemoryState memory;
  AttentionState attention;
};

/// What the memory at the head carries (`fast_head`): its matrix and, since a token is written when
/// the next one is known, the hidden state and the logits of the last one.
struct HeadState {
  at::Tensor state;   ///< [B, width, vocabulary], fp32 (fp64 in a fp64 model)
  at::Tensor hidden;  ///< [B, width]
  at::Tensor logits;  ///< [B, vocabulary], corrected, at least fp32
};

/// All that decides what a LanguageModel predicts next, beside its weights. A value type: copies
/// share tensors, and nothing but an in-place forward call writes into them.
struct LanguageModelState {
  std::vector<BlockState> blocks;
  at::Tensor position;  ///< int64 [B], tokens seen
  HeadState head;       ///< undefined tensors where a model has none

  /// The same values, cut from the graph: truncates back-propagation through time.
  LanguageModelState detach() const;
  /// Copies of all tensors.
  LanguageModelState clone() const;
  LanguageModelState to(at::Device device) const;
  /// A state whose rows where `mask` (bool [B]) is true are as at the start.
  LanguageModelState reset_rows(const at::Tensor& mask) const;

  int64_t batch() const;
  /// Bytes of all tensors.
  int64_t bytes() const;
  /// `layers.N.memory.state`, `layers.N.memory.conv`, `layers.N.attention.key`,
  /// `layers.N.attention.value` for each layer that has them, `head.state`, `head.hidden`,
  /// `head.logits` of a model that has a fast head, then `position`.
  NamedTensors tensors() const;
  /// The inverse of `tensors()`; any order.
  /// @throws StateMismatch on an unknown or repeated name, or without `position`
  static LanguageModelState from_tensors(const NamedTensors& tensors);
};

}  // namespace fastweights::nn
