/// \file
/// Gradient steps that a session takes on a feed-forward layer (docs/end_to_end.md). No LibTorch.
#pragma once

#include <cstdint>

namespace fastweights {

/// Learning end to end: the session owns a ΔW of the gate and the up projection of the last block's
/// feed-forward. After every few tokens it takes a step down the gradient of their next-token loss,
/// a sum of outer products of the layer's input and the error that reaches its output, as in
/// test-time training (arXiv:2512.23675). The model's weights stay as they are. The loss is that of
/// the model's logits before a memory at the head or an exact store corrects them.
struct EndToEndOptions {
  double learning_rate = 1.0;  ///< of a step along the gradient of the mean loss, in nats
  std::int64_t every = 32;     ///< tokens of a step, counted from the session's first
  double clip = 1.0;           ///< larger gradients are scaled down to this norm

  bool operator==(const EndToEndOptions&) const = default;
};

/// Throws Error if an option is out of range: the learning rate in [0, 1000], `every` in [1, 4096],
/// `clip` above 0, all finite.
void check_end_to_end_options(const EndToEndOptions& options);

}  // namespace fastweights
