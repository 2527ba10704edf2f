#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <utility>

#include "fastweights/nn/language_model.hpp"
#include "fastweights/session/end_to_end.hpp"
#include "fastweights/session/session.hpp"

namespace fastweights::detail {

/// The state before the first token.
EndToEndState initial_end_to_end(const EndToEndOptions& options,
                                 const nn::LanguageModelImpl& model);

/// The last block's feed-forward with a session's ΔW, which learns on the way. No tensor is written
/// into: copies of a state may share them.
class FeedForwardLearner {
 public:
  /// @param position tokens that the session has read
  FeedForwardLearner(const EndToEndOptions& options, const nn::LanguageModelImpl& model,
                     EndToEndState& state, std::int64_t position)
      : options_(options), model_(model), state_(state), position_(position) {}

  /// Reads tokens of these strengths (none: all 1) at once.
  /// @param mixed the residual stream before the feed-forward [1, T, width]
  /// @returns the same behind it
  at::Tensor read(std::span<const std::int64_t> tokens, std::span<const float> strengths,
                  const at::Tensor& mixed);

  /// The two halves of the same for one token that somebody else runs: what `state.delta` it is to
  /// be run with, and what stood before the feed-forward [width].
  void before_token(std::int64_t token, float strength);
  void after_token(std::int64_t token, float strength, const at::Tensor& mixed);

 private:
  std::int64_t waiting() const;
  void step(std::int64_t next, float strength);
  void append(std::span<const std::int64_t> tokens, std::span<const float> strengths,
              const at::Tensor& mixed);
  at::Tensor feed_forward(const at::Tensor& mixed) const;
  at::Tensor gradient(const at::Tensor& targets, const at::Tensor& weights) const;

  const EndToEndOptions& options_;
  const nn::LanguageModelImpl& model_;
  EndToEndState& state_;
  std::int64_t position_;
};

}  // namespace fastweights::detail
