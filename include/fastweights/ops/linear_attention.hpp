#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fastweights/ops/options.hpp"

namespace fastweights {

/// Linear attention, the Hebbian baseline, not normalised: S ← exp(g) S + k vᵀ; o = scale · Sᵀq
/// (Katharopoulos et al. 2020, arXiv 2006.16236; with a gate: Sun et al. 2023, arXiv 2307.08621).
///
/// \param q, k     [B, T, H, K]; bf16, fp16, fp32 or fp64; K and V from 1 to 256
/// \param v        [B, T, HV, V], the type of q; HV a multiple of H, value head j reads key head
///                 j / (HV / H)
/// \param g        [B, T, HV], the type of q or fp32: the logarithm of the decay, ≤ 0; without it
/// nothing
///                 decays
/// \param options  see RuleOptions
/// \return o and, if asked for, the final state. Differentiable in every tensor and initial_state.
/// \throws ShapeError naming the tensor, what was expected and what came
RuleResult linear_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& g = std::nullopt,
                            const RuleOptions& options = {});

/// The same token by token, on `state` [B, HV, K, V] in place: for decoding. Not differentiable.
/// \return o [B, T, HV, V]
/// \throws ShapeError
at::Tensor linear_attention_recurrent_(const at::Tensor& q, const at::Tensor& k,
                                       const at::Tensor& v, const std::optional<at::Tensor>& g,
                                       at::Tensor& state,
                                       std::optional<double> scale = std::nullopt,
                                       bool use_qk_l2norm = false);

}  // namespace fastweights
