#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fastweights/ops/options.hpp"

namespace fastweights {

/// Kimi Delta Attention, the delta rule with a decay for each channel of the key: S ← Diag(exp(g))
/// S, then S ← S + β k (v − Sᵀk)ᵀ; o = scale · Sᵀq (Kimi team 2025, "Kimi Linear", arXiv
/// 2510.26692).
///
/// \param q, k     [B, T, H, K]; bf16, fp16, fp32 or fp64; K and V from 1 to 256
/// \param v        [B, T, HV, V], the type of q; HV a multiple of H, value head j reads key head
///                 j / (HV / H)
/// \param g        [B, T, HV, K], the type of q or fp32: the logarithm of each channel's decay, ≤
/// 0; −∞
///                 forgets exactly
/// \param beta     [B, T, HV], the type of q or fp32; may reach 2
/// \param options  see RuleOptions
/// \return o and, if asked for, the final state. Differentiable in every tensor and initial_state.
/// \throws ShapeError naming the tensor, what was expected and what came
RuleResult kda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
               const at::Tensor& beta, const RuleOptions& options = {});

/// The same token by token, on `state` [B, HV, K, V] in place: for decoding. Not differentiable.
/// \return o [B, T, HV, V]
/// \throws ShapeError
at::Tensor kda_recurrent_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                          std::optional<double> scale = std::nullopt, bool use_qk_l2norm = false);

}  // namespace fastweights
