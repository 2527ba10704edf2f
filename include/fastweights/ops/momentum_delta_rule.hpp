#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastweights {

/// The state of `momentum_delta_rule`: the matrix S and its momentum M, each [B, HV, K, V] (packed
/// [N, HV, K, V]), fp32 (fp64 for fp64 inputs).
struct MomentumState {
  at::Tensor state;
  at::Tensor momentum;
};

/// What the rule takes beside its tensors; as RuleOptions, with a pair for a state.
struct MomentumRuleOptions {
  std::optional<at::Tensor> p;                 ///< [B, T, H, K]: what is read; k unless given
  std::optional<double> scale;                 ///< of the output; 1 / sqrt(K) unless given
  std::optional<MomentumState> initial_state;  ///< zeros unless given
  bool output_final_state = false;       ///< whether `MomentumRuleResult::final_state` is filled
  std::optional<at::Tensor> cu_seqlens;  ///< packed input: int64 [N + 1], with B = 1
  bool use_qk_l2norm = false;            ///< q and k (not a given p) become x · rsqrt(Σx² + 1e-6)
};

/// What the rule returns; `auto [o, state] = …` works.
struct MomentumRuleResult {
  at::Tensor o;                              ///< [B, T, HV, V], v's dtype
  std::optional<MomentumState> final_state;  ///< unless not asked for
};

/// The delta rule with momentum: M ← μ M + η k (v − Sᵀp)ᵀ, then S ← exp(g) S + β M; o = scale · Sᵀq
/// (Behrouz et al. 2024, "Titans", arXiv 2501.00663, with a linear memory).
///
/// \param q, k     [B, T, H, K]; bf16, fp16, fp32 or fp64; K and V from 1 to 256
/// \param v        [B, T, HV, V], the type of q; HV a multiple of H, value head j reads key head
///                 j / (HV / H)
/// \param g        [B, T, HV], the type of q or fp32: the logarithm of the decay, ≤ 0
/// \param beta, mu, eta  [B, T, HV], the type of q or fp32: from 0 to 1
/// \param options  see MomentumRuleOptions
/// \return o and, if asked for, the final state. Differentiable in every tensor and initial_state.
/// \throws ShapeError naming the tensor, what was expected and what came
MomentumRuleResult momentum_delta_rule(const at::Tensor& q, const at::Tensor& k,
                                       const at::Tensor& v, const at::Tensor& g,
                                       const at::Tensor& beta, const at::Tensor& mu,
                                       const at::Tensor& eta,
                                       const MomentumRuleOptions& options = {});

/// The same token by token, on `state` in place: for decoding. Not differentiable.
/// \return o [B, T, HV, V]
/// \throws ShapeError
at::Tensor momentum_delta_rule_recurrent_(const at::Tensor& q, const at::Tensor& k,
                                          const at::Tensor& v, const at::Tensor& g,
                                          const at::Tensor& beta, const at::Tensor& mu,
                                          const at::Tensor& eta, MomentumState& state,
                                          const std::optional<at::Tensor>& p = std::nullopt,
                                          std::optional<double> scale = std::nullopt,
                                          bool use_qk_l2norm = false);

}  // namespace fastweights
