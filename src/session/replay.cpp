#include "replay.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "decoder.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/nn/language_model.hpp"
#include "feed_forward_learner.hpp"
#include "least_squares.hpp"
#include "protected_rule.hpp"
#include "recollection.hpp"

namespace fastweights::detail {
namespace {

/// Written tokens between two checkpoints: each is a copy of the state.
constexpr std::int64_t kWrittenSpacing = 64;

/// Written tokens that are replayed in one pass.
constexpr std::int64_t kReplayedAtOnce = 16;

at::Device device_of(const nn::LanguageModelImpl& model) {
  return model.embedding->weight.device();
}

/// Options for tokens of these strengths; β can only be limited where one is above 1.
nn::ForwardOptions options_for(std::span<const float> strengths, at::Device device) {
  nn::ForwardOptions options;
  if (strengths.empty()) return options;
  const at::Tensor values = at::tensor(at::ArrayRef<float>(strengths.data(), strengths.size()));
  options.write_strength = values.unsqueeze(0).to(device);
  options.limited_writes = at::zeros({1}, at::TensorOptions(at::kLong).device(device));
  return options;
}

void check_finite(const at::Tensor& logits, const nn::LanguageModelState& state,
                  const at::Tensor& delta) {
  const auto finite = [](const at::Tensor& tensor) {
    return !tensor.is_floating_point() || std::isfinite(tensor.sum(at::kDouble).item<double>());
  };
  if (!finite(logits)) {
    throw Error("session: the model's prediction is not finite any more; the piece was not read");
  }
  nn::NamedTensors tensors = state.tensors();
  if (delta.defined()) tensors.emplace_back("end_to_end.delta", delta);
  for (const auto& [name, tensor] : tensors) {
    if (finite(tensor)) continue;
    throw Error("session: " + name + " is not finite any more; the piece was not read");
  }
}

/// Scales each matrix of [B, heads, K, V] or [B, K, V] down to a norm; returns how many it scaled.
std::int64_t cap_norm(at::Tensor& state, double cap) {
  if (cap <= 0.0 || !state.defined()) return 0;
  const at::Tensor norms = at::linalg_matrix_norm(state, "fro", {-2, -1}, /*keepdim=*/true);
  const auto larger = (norms > cap).sum().item<std::int64_t>();
  if (larger > 0) state = state * (cap / norms).clamp_max(1.0);
  return larger;
}

}  // namespace

at::Tensor to_tensor(std::span<const std::int64_t> values) {
  return at::tensor(at::IntArrayRef(values.data(), values.size()), at::kLong);
}

at::Tensor bits_of(std::span<const std::int64_t> tokens, const at::Tensor& before,
                   const at::Tensor& rows) {
  const at::Tensor ahead = at::cat(
      {before.unsqueeze(0), rows.slice(0, 0, static_cast<std::int64_t>(tokens.size()) - 1)});
  const at::Tensor ids = to_tensor(tokens).to(rows.device()).unsqueeze(1);
  return at::log_softmax(ahead, 1).gather(1, ids).squeeze(1).mul(-1.0 / std::log(2.0)).cpu();
}

// ---- reading ahead

const Place& Replay::place() {
  settle();
  return place_;
}

bool Replay::has_read(std::int64_t token) const {
  return is_ahead_ && taken_ < std::ssize(ahead_.tokens) &&
         ahead_.tokens[static_cast<std::size_t>(taken_)] == token;
}

/// Whether what a token does to the state can be known before the one ahead of it is: a gate for
/// surprise asks for its prediction, a cap changes the state after each, a gradient step the model.
bool Replay::may_read_ahead() const {
  return !policy_.surprise && !policy_.caps_norms() && !options_.end_to_end &&
         strength_under(policy_, 1.0F, 0.0) <= 1.0F;
}

/// Takes the next of the tokens that were read ahead.
void Replay::take_ahead(at::Tensor& hidden) {
  place_.logits = ahead_.logits[taken_].clone();
  if (ahead_.hidden.defined()) hidden = ahead_.hidden[taken_].clone();
  ++taken_;
}

/// Moves the state to where the tokens that were taken end, and forgets the others.
void Replay::settle() {
  if (!is_ahead_) return;
  if (taken_ == std::ssize(ahead_.tokens)) {
    std::swap(place_.state, ahead_.state);
  } else {
    Decoder::of(model_)->keep(model_, ahead_, taken_, place_.state);
  }
  is_ahead_ = false;
  taken_ = 0;
}

std::int64_t Replay::most_guesses(std::int64_t position) {
  return (kWrittenSpacing - position % kWrittenSpacing) % kWrittenSpacing;
}

// ---- steps

/// What the model predicts at this place, without the exact store.
at::Tensor Replay::predictions() const {
  return place_.recollection ? place_.recollection->logits().to(device_of(model_)) : place_.logits;
}

std::int64_t Replay::position() const { return place_.state.position.item<std::int64_t>(); }

/// What moves on in a call of `forward`: not the exact store, whose copies cost something.
Place Replay::beside_the_model() const {
  Place next;
  next.end_to_end = place_.end_to_end;
  next.covariances = place_.covariances;
  next.refused_writes = place_.refused_writes;
  return next;
}

/// Runs the rule of a layer's memory, where it is not the model's own.
std::tuple<at::Tensor, at::Tensor> Replay::run_rule(std::int64_t layer, const MemoryRuleCall& call,
                                                    Place& next) const {
  const auto index = static_cast<std::size_t>(layer);
  const auto rule = [&](const MemoryRuleCall& unit) {
    return policy_.ridge > 0.0 ? least_squares(unit, next.covariances[index])
                               : delta_rule_of_any_keys(unit);
  };
  const MemoryRuleCall unit = with_unit_keys(call);
  if (!options_.protection) return rule(unit);
  const at::Tensor projector = options_.protection->projectors[index].to(call.state.options());
  const at::Tensor& first = model_.blocks[index]->memory->initial_matrix;
  const at::Tensor kept = first.defined() ? at::matmul(projector, first.to(call.state.dtype()))
                                          : at::zeros_like(call.state[0]);
  return protected_rule(unit, {projector, kept, options_.protection->least_free}, rule,
                        next.refused_writes);
}

/// Calls the model on tokens of one row; what the session keeps beside the model's state moves on
/// in `next`.
nn::LanguageModelOutput Replay::forward(std::span<const std::int64_t> tokens,
                                        std::span<const float> strengths,
                                        nn::ForwardOptions options, Place& next) const {
  const at::Tensor input = to_tensor(tokens).unsqueeze(0).to(device_of(model_));
  if (has_own_rule()) {
    options.memory_rule = [&](std::int64_t layer, const MemoryRuleCall& call) {
      return run_rule(layer, call, next);
    };
  }
  if (!options_.end_to_end) return model_.forward(input, place_.state, options);
  FeedForwardLearner learner(*options_.end_to_end, model_, next.end_to_end, position());
  options.last_feed_forward = [&](const at::Tensor& mixed) {
    return learner.read(tokens, strengths, mixed);
  };
  return model_.forward(input, place_.state, options);
}

/// The strengths of tokens to be read under the policy; none where all are 1.
std::vector<float> Replay::policy_strengths(std::span<const std::int64_t> tokens,
                                            std::span<const float> strengths) const {
  std::vector<float> own(strengths.begin(), strengths.end());
  if (!policy_.changes_strengths()) return own;
  if (own.empty()) own.resize(tokens.size(), 1.0F);
  std::vector<float> bits(tokens.size());
  if (policy_.surprise) {
    std::vector<float> ungated = own;
    const WritePolicy without{.strength = policy_.strength};
    for (float& each : ungated) each = strength_under(without, each, 0.0);
    Place next = beside_the_model();
    const auto options = options_for(ungated, device_of(model_));
    const at::Tensor rows = forward(tokens, ungated, options, next).logits.squeeze(0);
    const at::Tensor costs = bits_of(tokens, predictions(), rows.to(at::kFloat));
    std::copy_n(costs.const_data_ptr<float>(), bits.size(), bits.begin());
  }
  for (std::size_t t = 0; t < own.size(); ++t) own[t] = strength_under(policy_, own[t], bits[t]);
  return own;
}

/// The strength of a token that is written.
float Replay::policy_strength(std::int64_t token) const {
  if (!policy_.changes_strengths()) return 1.0F;
  double bits = 0.0;
  if (policy_.surprise) {
    const at::Tensor before = predictions();
    bits = bits_of({&token, 1}, before, before.unsqueeze(0)).item<float>();
  }
  return strength_under(policy_, 1.0F, bits);
}

at::Tensor Replay::read(std::span<const std::int64_t> tokens, std::span<const float> given) {
  settle();
  const std::vector<float> strengths = policy_strengths(tokens, given);
  nn::ForwardOptions options = options_for(strengths, device_of(model_));
  at::Tensor hidden;
  if (place_.recollection) options.hidden = &hidden;
  Place next = beside_the_model();
  auto [logits, state] = forward(tokens, strengths, options, next);
  at::Tensor rows = logits.squeeze(0).to(at::kFloat);
  check_finite(rows[-1], state, next.end_to_end.delta);
  if (options.limited_writes.defined()) {
    place_.limited_writes += options.limited_writes.item<std::int64_t>();
  }
  if (place_.recollection) {
    rows = own(place_.recollection).read(tokens, hidden.squeeze(0), rows, strengths);
  }
  place_.state = std::move(state);
  place_.logits = rows[-1].clone();
  place_.end_to_end = std::move(next.end_to_end);
  place_.covariances = std::move(next.covariances);
  place_.refused_writes = next.refused_writes;
  own_ = false;  // a branch that is switched off passes its tensors on
  cap_norms();
  return rows;
}

void Replay::write_each(const nn::LanguageModelImpl& model, std::span<const WrittenToken> tokens) {
  const auto kernels = Decoder::of(model);
  std::vector<at::Tensor> hidden(tokens.size());
  std::vector<at::Tensor> mixed(tokens.size());
  std::vector<float> strengths(tokens.size());
  std::vector<DecoderStep> steps;
  std::vector<DecoderAhead> ahead;
  std::vector<std::vector<std::int64_t>> runs;
  runs.reserve(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const auto& [replay, token, guesses] = tokens[i];
    const Decoder* decoder = replay->has_own_rule() ? nullptr : kernels.get();
    strengths[i] = replay->policy_strength(token);
    if (replay->has_read(token)) continue;
    replay->settle();
    Place& place = replay->place_;
    const bool wants_hidden = place.recollection != nullptr;
    replay->own_state();
    if (decoder && !guesses.empty() && replay->may_read_ahead()) {
      auto& run = runs.emplace_back(1, token);
      const auto most = std::min(std::ssize(guesses), decoder->most_ahead() - 1);
      run.insert(run.end(), guesses.begin(), guesses.begin() + most);
      ahead.push_back({run, &place.state, strengths[i], wants_hidden, &replay->ahead_});
      replay->is_ahead_ = true;
      continue;
    }
    const DecoderStep step{.token = token,
                           .state = &place.state,
                           .logits = &place.logits,
                           .strength = strengths[i],
                           .hidden = wants_hidden ? &hidden[i] : nullptr};
    if (decoder && step.strength <= 1.0F) {
      steps.push_back(step);
      replay->learn_before(steps.back(), mixed[i]);
    } else {  // the kernels limit a β without counting it
      replay->step_by_modules(step);
    }
  }
  if (!steps.empty() || !ahead.empty()) kernels->step(model, steps, ahead);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    Replay& replay = *tokens[i].replay;
    if (replay.is_ahead_) replay.take_ahead(hidden[i]);
    if (mixed[i].defined()) replay.learn_after(tokens[i].token, strengths[i], mixed[i]);
    replay.recollect(tokens[i].token, hidden[i], strengths[i]);
    replay.cap_norms();
  }
}

void Replay::own_state() {
  if (!own_) place_.state = place_.state.clone();
  own_ = true;
}

void Replay::step_by_modules(const DecoderStep& step) {
  nn::ForwardOptions options;
  if (step.strength != 1.0F) options = options_for({&step.strength, 1}, device_of(model_));
  options.in_place = true;
  options.hidden = step.hidden;
  auto [logits, state] = forward({&step.token, 1}, {&step.strength, 1}, options, place_);
  if (options.limited_writes.defined()) {
    place_.limited_writes += options.limited_writes.item<std::int64_t>();
  }
  *step.state = std::move(state);
  if (step.hidden != nullptr) *step.hidden = step.hidden->flatten();
  *step.logits = logits.flatten().to(at::kFloat, false, /*copy=*/true);
}

/// Takes the gradient step that the token ends, if it ends one, and has the kernels run with ΔW.
void Replay::learn_before(DecoderStep& step, at::Tensor& mixed) {
  if (!options_.end_to_end) return;
  FeedForwardLearner(*options_.end_to_end, model_, place_.end_to_end, position())
      .before_token(step.token, step.strength);
  step.delta = &place_.end_to_end.delta;
  step.mixed = &mixed;
}

/// Keeps what the next gradient step needs of a token that the kernels have read.
void Replay::learn_after(std::int64_t token, float strength, const at::Tensor& mixed) {
  FeedForwardLearner(*options_.end_to_end, model_, place_.end_to_end, position() - 1)
      .after_token(token, strength, mixed.to(place_.end_to_end.waiting.dtype()));
}

/// Mixes the exact store, where there is one, into the model's logits after a token.
void Replay::recollect(std::int64_t token, const at::Tensor& hidden, float strength) {
  if (!place_.recollection) return;
  place_.logits = own(place_.recollection)
                      .write(token, hidden, place_.logits, strength)
                      .to(place_.logits.device());
}

/// Scales down what exceeds the policy's caps.
void Replay::cap_norms() {
  if (!policy_.caps_norms()) return;
  for (auto& block : place_.state.blocks) {
    place_.capped_norms += cap_norm(block.memory.state, policy_.memory_norm_cap);
  }
  place_.capped_norms += cap_norm(place_.state.head.state, policy_.head_norm_cap);
}

void Replay::run(const SessionLog& log, std::int64_t begin, std::int64_t piece, Journal& journal,
                 const Progress& progress) {
  for (std::int64_t at = begin; at < log.end();) {
    const LogStep step = log.step_at(at, piece);
    if (step.written) {
      at = write_span(log, at, piece, journal);
    } else {
      read(log.tokens(step.begin, step.end), log.strengths(step.begin, step.end));
      journal.add(step.end, place_);
      at = step.end;
    }
    const bool go_on = !progress || progress(at - begin, log.end() - begin);
    if (!go_on && at < log.end()) {
      throw Cancelled("session: stopped after replaying " + std::to_string(at - begin) + " of " +
                      std::to_string(log.end() - begin) + " tokens; the session is as it was");
    }
  }
}

/// Replays the written token at `begin`, and with it those written after it that a pass can take;
/// returns where they end.
std::int64_t Replay::write_span(const SessionLog& log, std::int64_t begin, std::int64_t piece,
                                Journal& journal) {
  std::int64_t end = begin + 1;
  const std::int64_t most =
      std::min(log.end(), end + std::min(kReplayedAtOnce - 1, most_guesses(end)));
  while (end < most && log.step_at(end, piece).written) ++end;
  const std::vector<std::int64_t> tokens = log.tokens(begin, end);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const WrittenToken token{this, tokens[i], std::span(tokens).subspan(i + 1)};
    write_each(model_, {&token, 1});
  }
  checkpoint_written(end, journal);
  return end;
}

void Replay::checkpoint_written(std::int64_t position, Journal& journal) {
  if (position % kWrittenSpacing == 0) journal.add(position, place());
}

}  // namespace fastweights::detail
