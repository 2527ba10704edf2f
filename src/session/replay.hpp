#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <tuple>
#include <vector>

#include "decoder.hpp"
#include "fastweights/session/log.hpp"
#include "fastweights/session/session.hpp"
#include "journal.hpp"

namespace fastweights::detail {

class Replay;

/// A token that a replay is to read, and a guess at those that come after it.
struct WrittenToken {
  Replay* replay = nullptr;
  std::int64_t token = 0;
  /// Read in the same pass, where the model is fused and the policy lets a token's strength and
  /// state be known ahead; kept where they turn out to be the tokens that are written next. They
  /// change nothing but the time it takes.
  std::span<const std::int64_t> guesses = {};
};

/// Moves a place on through a text. All that a session computes goes through here, whether it is
/// read or written for the first time or replayed, so that a log gives the same bits either way.
/// To be used in inference mode.
class Replay {
 public:
  /// `model` and `options` must outlive it.
  Replay(const nn::LanguageModelImpl& model, const SessionOptions& options, Place place)
      : model_(model), options_(options), policy_(options.policy), place_(std::move(place)) {}

  /// Where it stands.
  const Place& place();
  /// The logits there.
  const at::Tensor& logits() const { return place_.logits; }
  /// Whether `token` has been read ahead, so that writing it costs nothing.
  bool has_read(std::int64_t token) const;

  /// Reads tokens at once, with their strengths or none where all are 1; returns the logits after
  /// each of them, fp32 [T, vocabulary]. Throws Error, and stays where it is, if what the model
  /// computes is not finite.
  at::Tensor read(std::span<const std::int64_t> tokens, std::span<const float> strengths = {});

  /// Reads one token of each of some replays of one model, none twice, as `Session::write` does: in
  /// one pass over the weights, and each gets the bits that it gets alone.
  static void write_each(const nn::LanguageModelImpl& model, std::span<const WrittenToken> tokens);

  /// Processes the log from `begin`, where the place stands, to its end, and leaves checkpoints.
  /// Throws Cancelled if `progress` says so between two steps.
  void run(const SessionLog& log, std::int64_t begin, std::int64_t piece, Journal& journal,
           const Progress& progress);

  /// Leaves a checkpoint after a written token, now and then.
  void checkpoint_written(std::int64_t position, Journal& journal);

  /// How many tokens may be guessed after one that ends at `position`, so that what is read ahead
  /// ends where a checkpoint is left.
  static std::int64_t most_guesses(std::int64_t position);

 private:
  nn::LanguageModelOutput forward(std::span<const std::int64_t> tokens,
                                  std::span<const float> strengths, nn::ForwardOptions options,
                                  Place& next) const;
  Place beside_the_model() const;
  std::tuple<at::Tensor, at::Tensor> run_rule(std::int64_t layer, const MemoryRuleCall& call,
                                              Place& next) const;
  bool has_own_rule() const { return policy_.ridge > 0.0 || options_.protection != nullptr; }
  std::int64_t position() const;
  void own_state();
  void settle();
  bool may_read_ahead() const;
  void take_ahead(at::Tensor& hidden);
  std::int64_t write_span(const SessionLog& log, std::int64_t begin, std::int64_t piece,
                          Journal& journal);
  void step_by_modules(const DecoderStep& step);
  void learn_before(DecoderStep& step, at::Tensor& mixed);
  void learn_after(std::int64_t token, float strength, const at::Tensor& mixed);
  void recollect(std::int64_t token, const at::Tensor& hidden, float strength);
  at::Tensor predictions() const;
  std::vector<float> policy_strengths(std::span<const std::int64_t> tokens,
                                      std::span<const float> strengths) const;
  float policy_strength(std::int64_t token) const;
  void cap_norms();

  const nn::LanguageModelImpl& model_;
  const SessionOptions& options_;
  const WritePolicy& policy_;
  Place place_;
  bool own_ = false;  // nobody else has the tensors of `place_`
  ReadAhead ahead_;
  bool is_ahead_ = false;   // `place_.state` is that before its first token
  std::int64_t taken_ = 0;  // of its tokens
};

/// −log2 p of each token, fp32 [T] on the CPU: the first under the logits `before` it
/// [vocabulary], the others under `rows` [T, vocabulary], which are the logits after each token.
at::Tensor bits_of(std::span<const std::int64_t> tokens, const at::Tensor& before,
                   const at::Tensor& rows);

/// A tensor of values on the CPU.
at::Tensor to_tensor(std::span<const std::int64_t> values);

}  // namespace fastweights::detail
