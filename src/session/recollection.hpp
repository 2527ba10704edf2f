#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fastweights/session/exact_store.hpp"
#include "fastweights/session/session.hpp"

namespace fastweights::detail {

/// An exact store at a place of a session's text, and what the model says there: what is needed to
/// mix the two, and to learn the token that comes next. A value; copies share what neither changes.
class Recollection {
 public:
  Recollection(const ExactStoreOptions& options, const nn::LanguageModelImpl& model);

  /// Moves on through tokens that the model has read at once.
  /// @param hidden    its final hidden states after each [T, width]
  /// @param logits    its logits after each [T, vocabulary]
  /// @param strengths of the tokens; none: all 1
  /// @returns log p of what comes after each, by model and store: fp32 [T, vocabulary]
  at::Tensor read(std::span<const std::int64_t> tokens, const at::Tensor& hidden,
                  const at::Tensor& logits, std::span<const float> strengths);

  /// The same with one token: hidden [width], logits [vocabulary]; returns [vocabulary].
  at::Tensor write(std::int64_t token, const at::Tensor& hidden, const at::Tensor& logits,
                   float strength);

  /// What the model says at this place: fp32 [vocabulary] on the CPU.
  const at::Tensor& logits() const { return logits_; }

  const ExactStore& store() const { return store_; }

  /// What `state()` says of a store: its tensors, `store.hidden` and `store.logits`.
  std::vector<StoredTensor> tensors() const;
  /// The same without the store's content, which is kept once for all places of a text.
  std::vector<StoredTensor> place_tensors() const;

  /// The recollection that is stored in `place_tensors`; `content` holds what its store held.
  static Recollection from_tensors(const ExactStore& content, const nn::LanguageModelImpl& model,
                                   std::span<const io::TensorData> tensors);

 private:
  explicit Recollection(ExactStore store) : store_(std::move(store)) {}

  void move_to(at::Tensor hidden, at::Tensor logits);
  void mix_into(float* out) const;

  ExactStore store_;
  at::Tensor hidden_;  // fp32 [width] on the CPU
  at::Tensor logits_;  // fp32 [vocabulary] on the CPU
  Recall recall_;      // for hidden_
};

/// LibTorch's type of a store's tensor.
at::ScalarType torch_type(io::ScalarType type);

/// Copies as LibTorch's tensors.
nn::NamedTensors to_named_tensors(std::span<const StoredTensor> stored);

/// The tensors whose names have the prefix, named without it.
std::vector<io::TensorData> with_prefix(const std::string& prefix,
                                        std::span<const io::TensorData> tensors);

}  // namespace fastweights::detail
