#include "feed_forward_learner.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <vector>

#include "../nn/projection.hpp"
#include "replay.hpp"

namespace fastweights::detail {
namespace {

/// fp32, or fp64 for a model in fp64.
at::ScalarType compute_type(const nn::LanguageModelImpl& model) {
  return model.norm->weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

const at::Tensor& output_weight(const nn::LanguageModelImpl& model) {
  return model.output.is_empty() ? model.embedding->weight : model.output->weight;
}

/// x / rms(x) [N, D], and 1 / rms(x) [N, 1].
std::pair<at::Tensor, at::Tensor> normed(const at::Tensor& x, double epsilon) {
  at::Tensor scale = (x.square().mean(-1, true) + epsilon).rsqrt();
  return {x * scale, std::move(scale)};
}

}  // namespace

EndToEndState initial_end_to_end(const EndToEndOptions& options,
                                 const nn::LanguageModelImpl& model) {
  const auto& config = model.config();
  const auto wide = at::TensorOptions(compute_type(model)).device(model.embedding->weight.device());
  const auto stored = model.embedding->weight.options().requires_grad(false);
  return {at::zeros({2 * config.feed_forward_width, config.width}, wide),
          at::zeros({options.every, config.width}, stored), at::zeros({options.every}, at::kLong),
          at::zeros({options.every}, at::kFloat)};
}

/// Tokens whose outer products are still to be taken.
std::int64_t FeedForwardLearner::waiting() const {
  return position_ == 0 ? 0 : (position_ - 1) % options_.every + 1;
}

at::Tensor FeedForwardLearner::read(std::span<const std::int64_t> tokens,
                                    std::span<const float> strengths, const at::Tensor& mixed) {
  const std::vector<float> ones(strengths.empty() ? tokens.size() : 0, 1.0F);
  if (strengths.empty()) strengths = ones;
  std::vector<at::Tensor> pieces;
  for (std::size_t begin = 0; begin < tokens.size();) {
    before_token(tokens[begin], strengths[begin]);
    const auto free = static_cast<std::size_t>(options_.every - position_ % options_.every);
    const std::size_t count = std::min(free, tokens.size() - begin);
    const at::Tensor piece =
        mixed.slice(1, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(begin + count));
    pieces.push_back(feed_forward(piece));
    append(tokens.subspan(begin, count), strengths.subspan(begin, count), piece.squeeze(0));
    begin += count;
  }
  return pieces.empty() ? mixed : at::cat(pieces, 1);
}

void FeedForwardLearner::before_token(std::int64_t token, float strength) {
  if (position_ > 0 && position_ % options_.every == 0) step(token, strength);
}

void FeedForwardLearner::after_token(std::int64_t token, float strength, const at::Tensor& mixed) {
  append({&token, 1}, {&strength, 1}, mixed.unsqueeze(0));
}

/// Keeps what the next step needs of some tokens; mixed: [N, width].
void FeedForwardLearner::append(std::span<const std::int64_t> tokens,
                                std::span<const float> strengths, const at::Tensor& mixed) {
  const std::int64_t begin = position_ % options_.every;
  const std::int64_t end = begin + std::ssize(tokens);
  const auto with = [&](const at::Tensor& rows, const at::Tensor& added) {
    at::Tensor out = begin == 0 ? at::zeros_like(rows) : rows.clone();
    out.slice(0, begin, end).copy_(added);
    return out;
  };
  state_.waiting = with(state_.waiting, mixed);
  state_.tokens = with(state_.tokens, to_tensor(tokens));
  state_.strengths =
      with(state_.strengths, at::tensor(at::ArrayRef<float>(strengths.data(), strengths.size())));
  position_ += std::ssize(tokens);
}

/// Learns the waiting tokens, of which each is to predict the one after it, the last one `next`.
void FeedForwardLearner::step(std::int64_t next, float strength) {
  const auto device = state_.delta.device();
  const at::Tensor targets = at::cat({state_.tokens.slice(0, 1), to_tensor({&next, 1})}).to(device);
  const at::Tensor last = at::full({1}, strength, at::kFloat);
  const at::Tensor weights = at::cat({state_.strengths.slice(0, 1), last});
  if (options_.learning_rate == 0.0 || weights.max().item<float>() == 0.0F) return;
  const at::Tensor gradient =
      this->gradient(targets, weights.to(state_.delta.options()) / options_.every);
  const double norm = gradient.norm().item<double>();
  const double scale = options_.learning_rate * std::min(1.0, options_.clip / norm);
  state_.delta = at::sub(state_.delta, gradient, norm > 0.0 ? scale : 0.0);
}

/// mixed + down(silu((gate + Δ) h) ⊙ (up + Δ) h) with h = feed_forward_norm(mixed).
at::Tensor FeedForwardLearner::feed_forward(const at::Tensor& mixed) const {
  const nn::BlockImpl& block = *model_.blocks.back();
  const at::Tensor h = block.feed_forward_norm->forward(mixed);
  const at::Tensor change = at::linear(h.to(state_.delta.dtype()), state_.delta);
  const auto halves = change.chunk(2, -1);
  const at::Tensor gate = nn::project(block.feed_forward->gate, h) + halves[0];
  const at::Tensor up = nn::project(block.feed_forward->up, h) + halves[1];
  return mixed + nn::project(block.feed_forward->down, (at::silu(gate) * up).to(mixed.dtype()));
}

/// Of Σ weight · loss, with respect to [gate; up]: [2 · feed_forward_width, width].
at::Tensor FeedForwardLearner::gradient(const at::Tensor& targets,
                                        const at::Tensor& weights) const {
  const nn::BlockImpl& block = *model_.blocks.back();
  const auto type = state_.delta.dtype();
  const double epsilon = model_.config().norm_epsilon;
  const at::Tensor down = block.feed_forward->down->weight.to(type);
  const at::Tensor out = output_weight(model_).to(type);
  const at::Tensor norm_weight = model_.norm->weight.to(type);

  const at::Tensor x = state_.waiting.to(type);
  const at::Tensor h = normed(x, epsilon).first * block.feed_forward_norm->weight.to(type);
  const auto halves = at::linear(h, state_.delta).chunk(2, -1);
  const at::Tensor gate = at::linear(h, block.feed_forward->gate->weight.to(type)) + halves[0];
  const at::Tensor up = at::linear(h, block.feed_forward->up->weight.to(type)) + halves[1];
  const at::Tensor sigmoid = gate.sigmoid();
  const at::Tensor silu = gate * sigmoid;
  const auto [y, scale] = normed(x + at::linear(silu * up, down), epsilon);
  const at::Tensor p = at::softmax(at::linear(y * norm_weight, out), -1);

  const at::Tensor ones = at::ones({targets.size(0), 1}, p.options());
  const at::Tensor error = p.scatter_add(1, targets.unsqueeze(1), -ones) * weights.unsqueeze(1);
  const at::Tensor d_y = at::matmul(error, out) * norm_weight;
  const at::Tensor d_x = (d_y - y * (d_y * y).mean(-1, true)) * scale;
  const at::Tensor d_product = at::matmul(d_x, down);
  const at::Tensor d_up = d_product * silu;
  const at::Tensor d_gate = d_product * up * sigmoid * (1 + gate * (1 - sigmoid));
  return at::matmul(at::cat({d_gate, d_up}, 1).t(), h);
}

}  // namespace fastweights::detail
