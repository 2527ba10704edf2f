#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "fastweights/ops/options.hpp"

namespace fastweights {

/// DeltaProduct: the state decays once, then takes n = `num_householder` delta writes a token:
/// S ← exp(g) S, then n times S ← S + β k (v − Sᵀk)ᵀ; o = scale · Sᵀq (Siems et al. 2025,
/// "DeltaProduct", arXiv 2502.10297). Runs as `gated_delta_rule` on n steps a token.
///
/// \param q        [B, T, H, K]; bf16, fp16, fp32 or fp64; K and V from 1 to 256
/// \param k        [B, T · n, H, K]; row t · n + j is write j of token t
/// \param v        [B, T · n, HV, V], the type of q; HV a multiple of H
/// \param g        [B, T, HV], the type of q or fp32: the logarithm of the decay, ≤ 0; absent: none
/// \param beta     [B, T · n, HV], the type of q or fp32; may reach 2
/// \param options  see RuleOptions; cu_seqlens counts tokens
/// \return o [B, T, HV, V] and, if asked for, the final state. Differentiable in every tensor and
/// initial_state.
/// \throws ShapeError naming the tensor, what was expected and what came
RuleResult gated_delta_product(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const std::optional<at::Tensor>& g, const at::Tensor& beta,
                               std::int64_t num_householder, const RuleOptions& options = {});

/// The same token by token, on `state` [B, HV, K, V] in place: for decoding. Not differentiable.
/// \return o [B, T, HV, V]
/// \throws ShapeError
at::Tensor gated_delta_product_recurrent_(const at::Tensor& q, const at::Tensor& k,
                                          const at::Tensor& v, const std::optional<at::Tensor>& g,
                                          const at::Tensor& beta, at::Tensor& state,
                                          std::int64_t num_householder,
                                          std::optional<double> scale = std::nullopt,
                                          bool use_qk_l2norm = false);

}  // namespace fastweights
