#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace fastweights {

/// Constants of `fast_head`.
struct FastHeadParams {
  double eta = 0.3;       ///< write strength, up to 2
  double g = 0.0;         ///< log-decay of a token, ≤ 0; 0: nothing is forgotten
  bool in_place = false;  ///< inference only: the states given are overwritten and returned
  /// fp32 [B, T] or undefined (1): how strongly each token is learned; η is multiplied by it and
  /// limited to 2, g is multiplied by min(r, 1). It belongs to the token that comes, not to the one
  /// that predicts it.
  at::Tensor strength = {};
  at::Tensor limited = {};  ///< int64 [1]: the number of η that were limited is added; or undefined
};

/// The memory at the head of a language model: `softmax_delta_rule` over a text that comes in
/// pieces. What predicts the next token is written when that token is known; until then the last
/// hidden state and its corrected logits are part of the state. Zeros are a fresh state.
/// @param h       [B, T, D], the hidden states from which the logits are made
/// @param logits  [B, T, N], h's type or fp32
/// @param tokens  int64 [B, T], the tokens that were read
/// @param state   [B, D, N], fp32 (fp64 for a fp64 `hidden`)
/// @param hidden  [B, D], the last hidden state of the piece before
/// @param pending [B, N], its corrected logits
/// @return the corrected logits [B, T, N], the state, the last hidden state and its logits
/// @throws ShapeError naming the tensor, the expected and the given shape
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fast_head(
    const at::Tensor& h, const at::Tensor& logits, const at::Tensor& tokens,
    const at::Tensor& state, const at::Tensor& hidden, const at::Tensor& pending,
    const FastHeadParams& params);

}  // namespace fastweights
