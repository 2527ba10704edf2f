#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "fastweights/session/log.hpp"
#include "fastweights/session/session.hpp"
#include "journal.hpp"

namespace fastweights::detail {

/// Moves a place on through a text. All that a session computes goes through here, whether it is
/// read or written for the first time or replayed, so that a log gives the same bits either way.
/// To be used in inference mode.
class Replay {
 public:
  Replay(const nn::LanguageModelImpl& model, Place place)
      : model_(model), place_(std::move(place)) {}

  const Place& place() const { return place_; }

  /// Reads tokens at once, with their strengths or none where all are 1; returns the logits after
  /// each of them, fp32 [T, vocabulary].
  at::Tensor read(std::span<const std::int64_t> tokens, std::span<const float> strengths = {});

  /// Reads one token as `Session::write` does.
  void write(std::int64_t token);

  /// Processes the log from `begin`, where the place stands, to its end, and leaves checkpoints.
  /// Throws Cancelled if `progress` says so between two steps.
  void run(const SessionLog& log, std::int64_t begin, std::int64_t piece, Journal& journal,
           const Progress& progress);

  /// Leaves a checkpoint after a written token, now and then.
  void checkpoint_written(std::int64_t position, Journal& journal) const;

 private:
  at::Tensor step(std::int64_t token, at::Tensor* hidden);

  const nn::LanguageModelImpl& model_;
  Place place_;
  bool own_ = false;  // nobody else has the tensors of `place_`
};

/// A tensor of values on the CPU.
at::Tensor to_tensor(std::span<const std::int64_t> values);

}  // namespace fastweights::detail
