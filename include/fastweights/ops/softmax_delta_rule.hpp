#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastweights {

/// What the rule takes beside its tensors.
struct SoftmaxDeltaRuleOptions {
  std::optional<at::Tensor> g;  ///< [B, T], h's type or fp32: log-decay ≤ 0; none unless given
  std::optional<at::Tensor> initial_state;  ///< [B, D, N]; zeros unless given
  bool output_final_state = false;          ///< whether `final_state` is filled
  /// Token 0 is the last one of an earlier call: its logits are corrected already, and it only
  /// writes, now that its target is known. So a sequence can be read in pieces.
  bool pending = false;
};

/// What the rule returns; `auto [logits, final_state] = …` works.
struct SoftmaxDeltaRuleResult {
  at::Tensor logits;                      ///< [B, T, N], the type of the logits given
  std::optional<at::Tensor> final_state;  ///< [B, D, N], fp32 (fp64 for fp64 h)
};

/// The delta rule at the head of a language model, whose value is the token that comes next:
/// logits′_t = logits_t + Fᵀĥ_t, then F ← exp(g_t) F + η_t ĥ_t (onehot(target_t) −
/// softmax(logits′_t))ᵀ, with ĥ = h · rsqrt(Σh² + 1e-6). Token by token, exactly, whatever the
/// chunks: docs/softmax_delta_rule.md.
///
/// \param h        [B, T, D], the hidden state that predicts the token: bf16, fp16, fp32 or fp64
/// \param logits   [B, T, N], h's type or fp32
/// \param target   int64 [B, T], below N; where it is negative it is not known, and F stays as it
/// is
/// \param eta      [B, T], h's type or fp32: write strengths, from 0 to 4
/// \param options  see SoftmaxDeltaRuleOptions
/// \return logits′ and, if asked for, the final state. Differentiable in h, logits, eta, g and
/// initial_state.
/// \throws ShapeError naming the tensor, what was expected and what came
SoftmaxDeltaRuleResult softmax_delta_rule(const at::Tensor& h, const at::Tensor& logits,
                                          const at::Tensor& target, const at::Tensor& eta,
                                          const SoftmaxDeltaRuleOptions& options = {});

/// The same on `state` [B, D, N] in place: for decoding. Not differentiable.
/// \return logits′ [B, T, N]
/// \throws ShapeError
at::Tensor softmax_delta_rule_recurrent_(const at::Tensor& h, const at::Tensor& logits,
                                         const at::Tensor& target, const at::Tensor& eta,
                                         const std::optional<at::Tensor>& g, at::Tensor& state,
                                         bool pending = false);

}  // namespace fastweights
