#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fastweights/ops/options.hpp"

namespace fastweights {

/// The generalized delta rule, diagonal plus low rank: S ← Diag(exp(g)) S + b (Sᵀa)ᵀ + k vᵀ, the S
/// on the right being the state before the token; o = scale · Sᵀq (Peng et al. 2025, "RWKV-7",
/// arXiv 2503.14456).
///
/// \param q, k     [B, T, H, K]; bf16, fp16, fp32 or fp64; K and V from 1 to 256
/// \param v        [B, T, HV, V], the type of q; HV a multiple of H, value head j reads key head
///                 j / (HV / H)
/// \param a, b     [B, T, H, K], the type of q
/// \param g        [B, T, HV, K], the type of q or fp32: the logarithm of each channel's decay, ≤
/// 0; −∞
///                 forgets exactly
/// \param options  see RuleOptions
/// \return o and, if asked for, the final state. Differentiable in every tensor and initial_state.
/// \throws ShapeError naming the tensor, what was expected and what came
RuleResult generalized_delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const at::Tensor& a, const at::Tensor& b, const at::Tensor& g,
                                  const RuleOptions& options = {});

/// The same token by token, on `state` [B, HV, K, V] in place: for decoding. Not differentiable.
/// \return o [B, T, HV, V]
/// \throws ShapeError
at::Tensor generalized_delta_rule_recurrent_(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& a,
                                             const at::Tensor& b, const at::Tensor& g,
                                             at::Tensor& state,
                                             std::optional<double> scale = std::nullopt,
                                             bool use_qk_l2norm = false);

}  // namespace fastweights
