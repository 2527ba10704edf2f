#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/decoding.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/nn/state.hpp"

namespace fastweights::detail {

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

  /// Reads one token of a batch of one: `state` moves on in place. Returns the logits of the next
  /// one, fp32 [vocabulary].
  /// @param model    the decoder's, for its switches
  /// @param strength how strongly the token is learned, in [0, 2]
  /// @param hidden   null, or gets the final hidden state, normed: fp32 [width]
  at::Tensor step(const nn::LanguageModelImpl& model, std::int64_t token,
                  nn::LanguageModelState& state, float strength = 1.0F,
                  at::Tensor* hidden = nullptr) const;

 private:
  Decoder() = default;
  static std::unique_ptr<Decoder> make(const nn::LanguageModelImpl& model);

  cpu::DecodingModel model_;      // with all branches
  std::vector<at::Tensor> kept_;  // what `model_` points at
};

}  // namespace fastweights::detail
