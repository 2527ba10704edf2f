#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fastweights/ops/options.hpp"

namespace fastweights {

/// The delta rule: S ← S + β k (v − Sᵀk)ᵀ, o = scale · Sᵀq (Schlag et al. 2021, "Linear
/// Transformers Are Secretly Fast Weight Programmers"; in chunks after Yang et al. 2024, arXiv
/// 2406.06484).
///
/// \param q, k     [B, T, H, K]; bf16, fp16, fp32 or fp64; K and V from 1 to 256
/// \param v        [B, T, HV, V], the type of q; HV a multiple of H, value head j reads key head
///                 j / (HV / H)
/// \param beta     [B, T, HV], the type of q or fp32; may reach 2
/// \param options  see RuleOptions
/// \return o and, if asked for, the final state. Differentiable in q, k, v, beta and initial_state.
/// \throws ShapeError naming the tensor, what was expected and what came
RuleResult delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& beta, const RuleOptions& options = {});

/// The same token by token, on `state` [B, HV, K, V] in place: for decoding. Not differentiable.
/// \return o [B, T, HV, V]
/// \throws ShapeError
at::Tensor delta_rule_recurrent_(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& beta, at::Tensor& state,
                                 std::optional<double> scale = std::nullopt,
                                 bool use_qk_l2norm = false);

}  // namespace fastweights
