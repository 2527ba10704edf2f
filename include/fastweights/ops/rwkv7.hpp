#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fastweights/ops/options.hpp"

namespace fastweights {

/// `generalized_delta_rule` by RWKV-7's names: S ← Diag(exp(w)) S + b (Sᵀa)ᵀ + k vᵀ, o = scale ·
/// Sᵀr. The caller forms a = −κ̂, b = κ̂ ⊙ η and the written key (Peng et al. 2025, "RWKV-7", arXiv
/// 2503.14456).
///
/// \param r, k, a, b  [B, T, H, K]; bf16, fp16, fp32 or fp64
/// \param w           [B, T, HV, K], the type of r or fp32: the logarithm of the decay, ≤ 0
/// \param v           [B, T, HV, V], the type of r
/// \param options     see RuleOptions; scale is 1 unless given
/// \return o and, if asked for, the final state. Differentiable in every tensor and initial_state.
/// \throws ShapeError naming the tensor, what was expected and what came
RuleResult rwkv7(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k, const at::Tensor& v,
                 const at::Tensor& a, const at::Tensor& b, const RuleOptions& options = {});

/// The same token by token, on `state` [B, HV, K, V] in place: for decoding. Not differentiable.
/// \return o [B, T, HV, V]
/// \throws ShapeError
at::Tensor rwkv7_recurrent_(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& a, const at::Tensor& b,
                            at::Tensor& state, std::optional<double> scale = std::nullopt,
                            bool use_qk_l2norm = false);

}  // namespace fastweights
