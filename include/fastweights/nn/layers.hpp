#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <functional>
#include <optional>

#include "fastweights/nn/config.hpp"
#include "fastweights/nn/state.hpp"
#include "fastweights/ops/fast_weight_memory.hpp"

namespace fastweights::nn {

/// Root-mean-square norm over the last dimension with a learned scale that starts at one.
class RMSNormImpl : public torch::nn::Cloneable<RMSNormImpl> {
 public:
  RMSNormImpl(int64_t width, double epsilon);
  void reset() override;
  at::Tensor forward(const at::Tensor& x) const;

  at::Tensor weight;  ///< [width]

 private:
  int64_t width_;
  double epsilon_;
};
TORCH_MODULE(RMSNorm);

/// Feed-forward layer `down(silu(gate(x)) ⊙ up(x))` (arXiv:2002.05202).
class SwiGLUImpl : public torch::nn::Cloneable<SwiGLUImpl> {
 public:
  explicit SwiGLUImpl(LanguageModelConfig config);
  void reset() override;
  at::Tensor forward(const at::Tensor& x) const;

  torch::nn::Linear gate{nullptr}, up{nullptr}, down{nullptr};

 private:
  LanguageModelConfig config_;
};
TORCH_MODULE(SwiGLU);

/// Attention over the last `attention_window` tokens and learned sinks. The arithmetic between the
/// projections is `fastweights::sliding_window_attention`.
class SlidingWindowAttentionImpl : public torch::nn::Cloneable<SlidingWindowAttentionImpl> {
 public:
  /// What a call returns.
  struct Output {
    at::Tensor o;  ///< [B, T, width]
    AttentionState state;
  };

  explicit SlidingWindowAttentionImpl(LanguageModelConfig config);
  void reset() override;
  AttentionState initial_state(int64_t batch) const;
  /// @param x        [B, T, width]
  /// @param position int64 [B], tokens seen
  /// @param in_place inference only: `state` is overwritten and returned
  Output forward(const at::Tensor& x, const AttentionState& state, const at::Tensor& position,
                 bool in_place = false) const;

  torch::nn::Linear query{nullptr}, key{nullptr}, value{nullptr}, output{nullptr};
  at::Tensor sink_key;    ///< [heads, S, D / 2]
  at::Tensor sink_value;  ///< [heads, S, D]

 private:
  LanguageModelConfig config_;
};
TORCH_MODULE(SlidingWindowAttention);

/// The layer that owns a fast-weight matrix per head, written token by token with the (gated) delta
/// rule. The arithmetic between the projections is `fastweights::fast_weight_memory`.
///
/// When training starts, a_log is 0 and dt_bias is such that, without an input, the gates of all
/// heads of all layers have half-lives spread log-uniformly from `half_life_min` to
/// `half_life_max`; each layer has some of every scale. `decay` has small weights like every
/// projection, so that the gates start near these half-lives. "delta_rule" has no `decay`, `a_log`
/// and `dt_bias`.
class FastWeightMemoryImpl : public torch::nn::Cloneable<FastWeightMemoryImpl> {
 public:
  /// What a call returns.
  struct Output {
    at::Tensor o;  ///< [B, T, width]
    MemoryState state;
  };

  /// @param layer which of `config.layers` it is; decides its half-lives only
  explicit FastWeightMemoryImpl(LanguageModelConfig config, int64_t layer = 0);
  void reset() override;
  MemoryState initial_state(int64_t batch) const;
  /// @param x        [B, T, width]
  /// @param in_place inference only: `state` may be overwritten
  /// @param write    how strongly each token is learned
  /// @param rule     runs in place of the layer's own; empty: that
  Output forward(const at::Tensor& x, const MemoryState& state, bool in_place = false,
                 const WriteStrength& write = {}, const MemoryRule& rule = {}) const;

  torch::nn::Linear query{nullptr}, key{nullptr}, value{nullptr}, beta{nullptr}, decay{nullptr},
      gate{nullptr}, output{nullptr};
  at::Tensor convolution_weight;  ///< [2·H·K + HV·V, W]
  at::Tensor a_log;               ///< [HV]
  at::Tensor dt_bias;             ///< [HV]
  at::Tensor norm_weight;         ///< [V]
  at::Tensor initial_matrix;      ///< [HV, K, V], undefined where the configuration has none

 private:
  LanguageModelConfig config_;
  int64_t layer_;
};
TORCH_MODULE(FastWeightMemory);

/// A transformer block whose mixer is attention and memory side by side:
/// `x ← x + mix_attention ⊙ attention(n) + mix_memory ⊙ memory(n)` with n = mixer_norm(x), then
/// `x ← x + feed_forward(feed_forward_norm(x))`.
class BlockImpl : public torch::nn::Cloneable<BlockImpl> {
 public:
  /// What a call returns.
  struct Output {
    at::Tensor x;  ///< [B, T, width]
    BlockState state;
  };
  /// What a call may ask for.
  struct Options {
    bool in_place = false;
    at::Tensor memory_keep =
        {};  ///< [B, 1, 1], 0 where the row's memory is dropped; may be undefined
    WriteStrength write = {};
    MemoryRule rule = {};  ///< runs in place of the memory's own; empty: that
    /// In training `dropout` is drawn from it; without one, from PyTorch's own.
    std::optional<at::Generator> generator = {};
    /// Runs in place of `x + feed_forward(feed_forward_norm(x))`; null: that.
    const std::function<at::Tensor(const at::Tensor& x)>* feed_forward = nullptr;
  };

  explicit BlockImpl(LanguageModelConfig config, int64_t layer = 0);
  void reset() override;
  BlockState initial_state(int64_t batch) const;
  /// A branch that is switched off leaves its state as it was.
  Output forward(const at::Tensor& x, const BlockState& state, const at::Tensor& position,
                 const Options& options) const;

  RMSNorm mixer_norm{nullptr}, feed_forward_norm{nullptr};
  SlidingWindowAttention attention{nullptr};  ///< null if the configuration has none
  FastWeightMemory memory{nullptr};           ///< null if the configuration has none
  SwiGLU feed_forward{nullptr};
  at::Tensor mix_attention, mix_memory;  ///< [width], start at one

  bool attention_enabled = true;  ///< ablation: false leaves the branch out
  bool memory_enabled = true;

 private:
  at::Tensor mix(const at::Tensor& x, const BlockState& state, const at::Tensor& position,
                 const Options& options, BlockState& next) const;

  LanguageModelConfig config_;
  int64_t layer_;
};
TORCH_MODULE(Block);

}  // namespace fastweights::nn
