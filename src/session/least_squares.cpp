#include "least_squares.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace fastweights::detail {
namespace {

/// Tokens of a chunk.
constexpr std::int64_t kChunk = 64;

/// Tokens of a chunk, each [B, HV, T, …].
struct Chunk {
  at::Tensor q, k, v;
};

/// Outputs of a chunk, whose keys and values are weighted; state and covariance move on.
at::Tensor run(const Chunk& chunk, at::Tensor& state, at::Tensor& covariance) {
  const at::Tensor projected = at::matmul(chunk.k, covariance);
  const at::Tensor ones = at::eye(chunk.k.size(2), chunk.k.options());
  const at::Tensor factor =
      at::linalg_cholesky(at::matmul(projected, chunk.k.transpose(-1, -2)) + ones);
  const at::Tensor error = chunk.v - at::matmul(chunk.k, state);
  const at::Tensor w = at::linalg_solve_triangular(factor, projected, /*upper=*/false);
  const at::Tensor u = at::linalg_solve_triangular(factor, error, /*upper=*/false);
  const at::Tensor reach = at::matmul(chunk.q, w.transpose(-1, -2)).tril();
  at::Tensor o = at::matmul(chunk.q, state) + at::matmul(reach, u);
  const at::Tensor back = w.transpose(-1, -2);
  state = state + at::matmul(back, u);
  covariance = covariance - at::matmul(back, w);
  covariance = (covariance + covariance.transpose(-1, -2)) * 0.5;
  return o;
}

}  // namespace

Covariances initial_covariances(double ridge, const nn::LanguageModelImpl& model) {
  Covariances covariances;
  for (const auto& block : model.initial_state(1).blocks) {
    const at::Tensor& state = block.memory.state;
    const at::Tensor identity =
        at::eye(state.size(2), state.options().dtype(at::kDouble).requires_grad(false));
    covariances.push_back((identity / ridge).repeat({1, state.size(1), 1, 1}));
  }
  return covariances;
}

std::tuple<at::Tensor, at::Tensor> least_squares(const MemoryRuleCall& call,
                                                 at::Tensor& covariance) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(call.q.size(3)));
  const at::Tensor weight = call.beta.to(at::kDouble).sqrt().transpose(1, 2).unsqueeze(-1);
  const at::Tensor q = call.q.to(at::kDouble).transpose(1, 2) * scale;
  const at::Tensor k = call.k.to(at::kDouble).transpose(1, 2) * weight;
  const at::Tensor v = call.v.to(at::kDouble).transpose(1, 2) * weight;
  at::Tensor state = call.state.to(at::kDouble);
  std::vector<at::Tensor> out;
  for (std::int64_t begin = 0; begin < q.size(2); begin += kChunk) {
    const auto end = std::min(begin + kChunk, q.size(2));
    const auto rows = [&](const at::Tensor& x) { return x.slice(2, begin, end); };
    out.push_back(run({rows(q), rows(k), rows(v)}, state, covariance));
  }
  const at::Tensor o = out.empty() ? at::zeros_like(v) : at::cat(out, 2);
  return {o.transpose(1, 2).to(call.v.dtype()), state.to(call.state.dtype())};
}

}  // namespace fastweights::detail
