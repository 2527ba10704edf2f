#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/decoding.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/nn/state.hpp"

namespace fastweights::detail {

/// A session's next token.
struct DecoderStep {
  std::int64_t token = 0;
  nn::LanguageModelState* state = nullptr;  ///< of a batch of one; moves on in place
  at::Tensor* logits = nullptr;             ///< gets those of the token after it, fp32 [vocabulary]
  float strength = 1.0F;                    ///< how strongly it is learned, in [0, 2]
  at::Tensor* hidden = nullptr;             ///< null, or gets the final hidden state: fp32 [width]
  const at::Tensor* delta = nullptr;        ///< null, or DecodingToken::feed_forward_delta
  at::Tensor* mixed = nullptr;              ///< null, or gets DecodingToken::mixed: fp32 [width]
};

/// Tokens that were read in one pass ahead of a state: some of them, or none, may be kept. Its
/// memory is used again by the next pass.
struct ReadAhead {
  std::vector<std::int64_t> tokens;
  float strength = 1.0F;         ///< of each of them
  nn::LanguageModelState state;  ///< after all of them; its rings are those of the state before
  at::Tensor logits;             ///< after each of them, fp32 [T, vocabulary]
  at::Tensor hidden;             ///< undefined, or the final hidden states: fp32 [T, width]
  at::Tensor traces;             ///< fp32 [≥ T, cpu::decoding_trace]
  std::vector<std::byte> rows;   ///< what stood in the rings where the tokens stand now
};

/// Several tokens of a session, to be read ahead.
struct DecoderAhead {
  std::span<const std::int64_t> tokens;           ///< at least one, at most the window's
  const nn::LanguageModelState* state = nullptr;  ///< of a batch of one; only its rings change
  float strength = 1.0F;
  bool hidden = false;  ///< whether the hidden states are wanted
  ReadAhead* out = nullptr;
};

/// Steps a model token by token on the fused kernels, without the dispatcher. It reads the model's
/// matrices where they lie, and keeps copies of its vectors alone.
class Decoder {
 public:
  /// The decoder of a model, which all its sessions share: made when it is first asked for, and
  /// again once a tensor of the model was replaced, or a vector written. Null if the kernels cannot
  /// run this model as its modules would: it is not on the CPU, not all in fp32 or all in bf16, or
  /// a module is not what the configuration says (another size, a bias). Any number of threads may
  /// ask.
  static std::shared_ptr<const Decoder> of(const nn::LanguageModelImpl& model);

  /// Reads a token of each of some sessions, and several ahead of others: the weights pass once for
  /// all of them, and each gets the bits that it gets alone, token by token.
  /// @param model the decoder's, for its switches
  void step(const nn::LanguageModelImpl& model, std::span<const DecoderStep> steps,
            std::span<const DecoderAhead> ahead = {}) const;

  /// Moves a state on by the first `count` tokens that were read ahead of it, without the model;
  /// the others leave no trace.
  void keep(const nn::LanguageModelImpl& model, const ReadAhead& ahead, std::int64_t count,
            nn::LanguageModelState& state) const;
  /// The most tokens that one pass can read ahead.
  std::int64_t most_ahead() const;

 private:
  Decoder() = default;
  static std::unique_ptr<Decoder> make(const nn::LanguageModelImpl& model);

  cpu::DecodingModel model_;      // with all branches
  std::vector<at::Tensor> kept_;  // what `model_` points at
};

}  // namespace fastweights::detail
