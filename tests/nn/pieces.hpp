#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <vector>

#include "fastweights/nn/language_model.hpp"
#include "numerics.hpp"

// A text in pieces against the same text in one call.

namespace fastweights::test {

inline void check_close(const nn::LanguageModelState& state,
                        const nn::LanguageModelState& expected) {
  const auto a = state.tensors();
  const auto b = expected.tensors();
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    CAPTURE(a[i].first);
    CHECK(error_ratio(a[i].second, b[i].second) < 1e-5);
  }
}

/// Reads piece by piece; returns all logits, leaves the state in `state`.
inline at::Tensor read_in_pieces(const nn::LanguageModelImpl& model, const at::Tensor& tokens,
                                 int64_t piece, nn::LanguageModelState& state,
                                 nn::ForwardOptions options = {}) {
  std::vector<at::Tensor> logits;
  const auto strength = options.write_strength;
  for (int64_t begin = 0; begin < tokens.size(1); begin += piece) {
    const auto count = std::min(piece, tokens.size(1) - begin);
    if (strength.defined()) options.write_strength = strength.narrow(1, begin, count);
    auto output = model.forward(tokens.narrow(1, begin, count), state, options);
    state = std::move(output.state);
    logits.push_back(output.logits);
  }
  return at::cat(logits, 1);
}

/// The gradients of all parameters, from a loss on a text that is read piece by piece.
inline std::vector<at::Tensor> gradients_in_pieces(nn::LanguageModelImpl& model,
                                                   const at::Tensor& tokens, int64_t piece) {
  model.zero_grad();
  auto state = model.initial_state(tokens.size(0));
  read_in_pieces(model, tokens, piece, state).logsumexp(-1).mean().backward();
  std::vector<at::Tensor> gradients;
  for (const auto& parameter : model.parameters()) gradients.push_back(parameter.grad().clone());
  return gradients;
}

inline void check_close(const std::vector<at::Tensor>& given,
                        const std::vector<at::Tensor>& expected, double tolerance) {
  REQUIRE(given.size() == expected.size());
  for (size_t i = 0; i < given.size(); ++i) {
    CHECK(error_ratio(given[i], expected[i]) < tolerance);
  }
}

}  // namespace fastweights::test
