#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "fastweights/nn/language_model.hpp"
#include "fastweights/session/session.hpp"

namespace fastweights::detail {

/// Those before the first token: I / ridge.
Covariances initial_covariances(double ridge, const nn::LanguageModelImpl& model);

/// The rule of recursive least squares: after each token the state is the ridge solution over all
/// tokens so far, weighted by β (docs/write_policies.md). Exact in chunks; fp64 inside.
/// @param call       with q and k [B, T, HV, K] as they are to be used: not normalised here
/// @param covariance [B, HV, K, K]; gets another tensor, that after the last token
std::tuple<at::Tensor, at::Tensor> least_squares(const MemoryRuleCall& call,
                                                 at::Tensor& covariance);

}  // namespace fastweights::detail
