#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include "fastweights/nn/config.hpp"
#include "fastweights/nn/layers.hpp"
#include "fastweights/nn/state.hpp"

namespace fastweights::nn {

/// What a call of LanguageModel may ask for.
struct ForwardOptions {
  bool in_place = false;  ///< inference only: the state given is overwritten where it can be
  bool logits = true;     ///< false: only the state is wanted
  bool last_logits_only =
      false;  ///< logits [B, 1, vocabulary] of the last token ([B, 0, ...] if T = 0)
  at::Tensor memory_keep = {};  ///< [B, 1, 1], 0 where the row's memories are left out; undefined:
                                ///< drawn in training as `memory_dropout` says, else all are there
  /// In training `dropout` is drawn from it; without one, from PyTorch's own.
  std::optional<at::Generator> generator = {};
  /// fp32 [B, T], each in [0, 2]: how strongly each token is learned, see WriteStrength; undefined:
  /// all 1. Values are not checked. Differentiable, but where a β is limited.
  at::Tensor write_strength = {};
  /// int64 [1] or undefined: how many β were limited is added, over all layers and heads.
  at::Tensor limited_writes = {};
  /// Gets the final hidden states, normed, that the logits are made of: [B, T, width] (in Python: a
  /// forward hook on `norm`).
  at::Tensor* hidden = nullptr;
  /// Runs in place of the rule of each layer's memory, see MemoryRule; inference only. Empty: the
  /// model's own.
  std::function<std::tuple<at::Tensor, at::Tensor>(int64_t layer, const MemoryRuleCall& call)>
      memory_rule = {};
  /// Runs in place of the last block's feed-forward: gets the residual stream before it [B, T,
  /// width] and returns that behind it. Empty: `x + feed_forward(feed_forward_norm(x))`.
  std::function<at::Tensor(const at::Tensor& x)> last_feed_forward = {};
};

/// What a call of LanguageModel returns.
struct LanguageModelOutput {
  at::Tensor logits;  ///< [B, T, vocabulary], at least fp32; undefined if not wanted
  LanguageModelState state;
};

/// Where others keep what they derive from a model, for as long as the model lives: its sessions
/// the kernels that they write with. Copies of the model start with an empty one.
class DerivedSlot {
 public:
  DerivedSlot() = default;
  DerivedSlot(const DerivedSlot&) {}
  DerivedSlot& operator=(const DerivedSlot&) { return *this; }

  /// Calls `use(pointer)` with what is kept, which it may replace; one thread at a time.
  template <class Use>
  auto with(Use&& use) const {
    const std::lock_guard lock(mutex_);
    return use(kept_);
  }

 private:
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const void> kept_;
};

/// A language model whose blocks join windowed attention and fast-weight memories. It carries all
/// it keeps of what it read in an explicit state of fixed size: any number of callers may share one
/// model.
///
/// Weights start as in GPT-2 (Radford et al. 2019): normal(0, initializer_range), and layers that
/// write into the residual stream divided by √(2 · layers); norms at one; the convolution uniform
/// in ±1/√W (PyTorch's Conv1d); gates as FastWeightMemory says.
class LanguageModelImpl : public torch::nn::Cloneable<LanguageModelImpl> {
 public:
  /// @throws Error if the configuration is not valid
  explicit LanguageModelImpl(LanguageModelConfig config = {});
  void reset() override;
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<at::Device>& device = std::nullopt) const override;

  const LanguageModelConfig& config() const { return config_; }

  /// The state before the first token, in the weights' type (the fast weights in fp32) and on their
  /// device.
  LanguageModelState initial_state(int64_t batch) const;

  /// Reads T ≥ 0 tokens of each row.
  /// A sequence may come in pieces of any lengths: the result is that of one call, but for rounding
  /// (RMS 1e-5 in fp32). Without `in_place`, `state` stays as it was and gradients flow through it.
  /// Without gradients any number of threads may call it at once, each with its own state.
  /// @param tokens int64 [B, T]
  /// @throws ShapeError for tokens of a wrong shape or type, StateMismatch for the state of another
  ///         model or batch
  LanguageModelOutput forward(const at::Tensor& tokens, const LanguageModelState& state,
                              const ForwardOptions& options = {}) const;

  /// Switches a branch of every block on or off at run time (ablation).
  void enable_attention(bool enabled);
  void enable_memory(bool enabled);

  int64_t parameter_count() const;
  /// Bytes of a state for `batch` rows; does not depend on how much was read.
  int64_t state_bytes(int64_t batch = 1) const;

  /// [B, 1, 1] of zeros and ones from PyTorch's generator: which rows keep their memories in a step
  /// of training; undefined where all do.
  at::Tensor draw_memory_keep(int64_t batch) const;

  /// For the code that runs this model.
  const DerivedSlot& derived() const { return derived_; }

  torch::nn::Embedding embedding{nullptr};
  std::vector<Block> blocks;
  RMSNorm norm{nullptr};
  torch::nn::Linear output{nullptr};  ///< null if the embeddings are tied
  /// [width, vocabulary], what the memory at the head starts from; undefined where the
  /// configuration has none
  at::Tensor head_initial_matrix;

 private:
  void collect_blocks();
  /// Logits of the normed hidden states.
  at::Tensor to_logits(const at::Tensor& normed) const;
  /// Corrects the logits by the memory at the head and learns `tokens`.
  at::Tensor correct(const at::Tensor& normed, const at::Tensor& logits, const at::Tensor& tokens,
                     const HeadState& before, const ForwardOptions& options, HeadState& next) const;

  LanguageModelConfig config_;
  DerivedSlot derived_;
};
TORCH_MODULE(LanguageModel);

}  // namespace fastweights::nn
