#include "replay.hpp"

#include <torch/torch.h>

#include <string>
#include <utility>

#include "decoder.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/nn/language_model.hpp"
#include "recollection.hpp"

namespace fastweights::detail {
namespace {

/// Written tokens between two checkpoints: each is a copy of the state.
constexpr std::int64_t kWrittenSpacing = 64;

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

}  // namespace

at::Tensor to_tensor(std::span<const std::int64_t> values) {
  return at::tensor(at::IntArrayRef(values.data(), values.size()), at::kLong);
}

at::Tensor Replay::read(std::span<const std::int64_t> tokens, std::span<const float> strengths) {
  const at::Device device = device_of(model_);
  nn::ForwardOptions options = options_for(strengths, device);
  at::Tensor hidden;
  if (place_.recollection) options.hidden = &hidden;
  const at::Tensor input = to_tensor(tokens).unsqueeze(0).to(device);
  auto [logits, state] = model_.forward(input, place_.state, options);
  at::Tensor rows = logits.squeeze(0).to(at::kFloat);
  const std::int64_t limited =
      options.limited_writes.defined() ? options.limited_writes.item<std::int64_t>() : 0;
  if (place_.recollection) {
    rows = own(place_.recollection).read(tokens, hidden.squeeze(0), rows, strengths);
  }
  place_ = {std::move(state), rows[-1].clone(), place_.limited_writes + limited,
            std::move(place_.recollection)};
  own_ = false;  // a branch that is switched off passes its tensors on
  return rows;
}

void Replay::write(std::int64_t token) {
  if (!own_) place_.state = place_.state.clone();
  own_ = true;
  at::Tensor hidden;
  place_.logits = step(token, place_.recollection ? &hidden : nullptr);
  if (!place_.recollection) return;
  place_.logits =
      own(place_.recollection).write(token, hidden, place_.logits).to(place_.logits.device());
}

/// Moves the state on by a token; returns the model's logits.
at::Tensor Replay::step(std::int64_t token, at::Tensor* hidden) {
  if (const auto decoder = Decoder::of(model_)) {
    return decoder->step(model_, token, place_.state, 1.0F, hidden);
  }
  const at::Tensor input = to_tensor(std::span(&token, 1)).unsqueeze(0).to(device_of(model_));
  auto [logits, state] = model_.forward(input, place_.state, {.in_place = true, .hidden = hidden});
  place_.state = std::move(state);
  if (hidden != nullptr) *hidden = hidden->flatten();
  return logits.flatten().to(at::kFloat, false, /*copy=*/true);
}

void Replay::run(const SessionLog& log, std::int64_t begin, std::int64_t piece, Journal& journal,
                 const Progress& progress) {
  for (std::int64_t at = begin; at < log.end();) {
    const LogStep step = log.step_at(at, piece);
    const auto tokens = log.tokens(step.begin, step.end);
    if (step.written) {
      write(tokens.front());
      checkpoint_written(step.end, journal);
    } else {
      read(tokens, log.strengths(step.begin, step.end));
      journal.add(step.end, place_);
    }
    at = step.end;
    const bool go_on = !progress || progress(at - begin, log.end() - begin);
    if (!go_on && at < log.end()) {
      throw Cancelled("session: stopped after replaying " + std::to_string(at - begin) + " of " +
                      std::to_string(log.end() - begin) + " tokens; the session is as it was");
    }
  }
}

void Replay::checkpoint_written(std::int64_t position, Journal& journal) const {
  if (position % kWrittenSpacing == 0) journal.add(position, place_);
}

}  // namespace fastweights::detail
