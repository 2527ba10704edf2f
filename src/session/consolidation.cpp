#include "fastweights/session/consolidation.hpp"

#include <torch/torch.h>

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include "fastweights/core/error.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/nn/initial_values.hpp"
#include "fastweights/nn/language_model.hpp"

namespace fastweights {
namespace {

using nn::LanguageModelImpl;
using Model = std::shared_ptr<const LanguageModelImpl>;

constexpr std::int64_t kMostTrialTokens = 16384;
constexpr std::int64_t kLeastTrialTokens = 256;
constexpr std::int64_t kPiece = 1024;

/// The matrices that a session's memories hold; undefined where the model has none.
struct Learned {
  std::vector<at::Tensor> memories;  // [HV, K, V] of each layer
  at::Tensor head;                   // [D, vocabulary]
  at::Tensor feed_forward;           // [2 · feed_forward_width, D], what is added to the weights
};

Learned learned_by(const Session& session, std::int64_t layers) {
  std::map<std::string, at::Tensor> tensors;
  for (auto& [name, tensor] : session.state()) tensors.emplace(name, std::move(tensor));
  const auto find = [&](const std::string& name) {
    const auto found = tensors.find(name);
    return found == tensors.end() ? at::Tensor() : found->second.squeeze(0);
  };
  Learned learned;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    learned.memories.push_back(find("layers." + std::to_string(layer) + ".memory.state"));
  }
  learned.head = find("head.state");
  learned.feed_forward = find("end_to_end.delta");
  return learned;
}

/// What memories of `model` start from today.
Learned starts_of(const LanguageModelImpl& model) {
  const auto state = model.initial_state(1);
  Learned starts;
  for (const auto& block : state.blocks) {
    const auto& matrix = block.memory.state;
    starts.memories.push_back(matrix.defined() ? matrix.squeeze(0) : matrix);
  }
  if (state.head.state.defined()) starts.head = state.head.state.squeeze(0);
  return starts;
}

/// A model with the same weights, whose memories start from matrices that can be set.
class Candidate {
 public:
  /// @param feed_forward whether the last block's gate and up projection are to change too
  Candidate(const LanguageModelImpl& base, const ConsolidationOptions& options, bool feed_forward)
      : starts_(starts_of(base)) {
    auto config = base.config();
    config.memory_initial_matrix |= config.memory && options.memory;
    config.fast_head_initial_matrix |= config.fast_head && options.head;
    const nn::WithoutInitialValues fast;
    model_ = std::make_shared<LanguageModelImpl>(config);
    const auto weights = base.named_parameters();
    for (auto& item : model_->named_parameters()) {
      const auto* weight = weights.find(item.key());
      item.value().requires_grad_(false);
      item.value().set_data(weight != nullptr ? weight->detach()
                                              : item.value().to(base.norm->weight.device()));
    }
    for (std::size_t n = 0; n < base.blocks.size(); ++n) {
      model_->blocks[n]->attention_enabled = base.blocks[n]->attention_enabled;
      model_->blocks[n]->memory_enabled = base.blocks[n]->memory_enabled;
    }
    model_->eval();
    if (!feed_forward) return;
    const auto& layer = *base.blocks.back()->feed_forward;
    starts_.feed_forward = at::cat({layer.gate->weight, layer.up->weight}).detach();
  }

  /// Starts memories from their old matrices and shares of the changes; the same for projections.
  void set(const Learned& changes, const ConsolidationTrial& trial) {
    for (std::size_t n = 0; n < model_->blocks.size(); ++n) {
      auto& memory = model_->blocks[n]->memory;
      if (memory.is_empty() || !memory->initial_matrix.defined()) continue;
      memory->initial_matrix.set_data(starts_.memories[n] +
                                      changes.memories[n] * trial.memory_share);
    }
    if (model_->head_initial_matrix.defined()) {
      model_->head_initial_matrix.set_data(starts_.head + changes.head * trial.head_share);
    }
    if (!starts_.feed_forward.defined()) return;
    const auto& start = starts_.feed_forward;
    const auto change = changes.feed_forward * trial.feed_forward_share;
    const auto sum = (start.to(change.scalar_type()) + change).to(start.scalar_type());
    const auto halves = sum.chunk(2);
    auto& layer = *model_->blocks.back()->feed_forward;
    layer.gate->weight.set_data(halves[0].clone());
    layer.up->weight.set_data(halves[1].clone());
  }

  const Learned& starts() const { return starts_; }
  const std::shared_ptr<LanguageModelImpl>& model() const { return model_; }

 private:
  Learned starts_;
  std::shared_ptr<LanguageModelImpl> model_;
};

/// The means of ĥ ĥᵀ over a text, fp64 [D, D]: the directions that it is read with by the head, and
/// by the last block's feed-forward.
struct Directions {
  at::Tensor head;
  at::Tensor feed_forward;
};

/// Σ ĥ ĥᵀ of some hidden states [1, N, D].
at::Tensor sum_of_squares(const at::Tensor& hidden) {
  const auto rows = hidden.squeeze(0).to(at::kDouble).cpu();
  const auto unit = rows / rows.norm(2, -1, true).clamp_min(1e-12);
  return at::matmul(unit.t(), unit);
}

Directions directions_of(const LanguageModelImpl& model, std::string_view text) {
  const auto width = model.config().width;
  auto head = at::zeros({width, width}, at::kDouble);
  auto feed_forward = at::zeros({width, width}, at::kDouble);
  const auto& block = *model.blocks.back();
  const auto last_feed_forward = [&](const at::Tensor& x) {
    const auto h = block.feed_forward_norm->forward(x);
    feed_forward += sum_of_squares(h);
    return x + block.feed_forward->forward(h);
  };
  auto state = model.initial_state(1);
  for (std::size_t done = 0; done < text.size(); done += kPiece) {
    const auto piece = io::ByteTokenizer().encode(text.substr(done, kPiece));
    const auto tokens = at::tensor(piece, at::kLong).unsqueeze(0);
    at::Tensor normed;
    state =
        model
            .forward(tokens.to(model.norm->weight.device()), state,
                     {.logits = false, .hidden = &normed, .last_feed_forward = last_feed_forward})
            .state;
    head += sum_of_squares(normed);
  }
  const auto count = static_cast<double>(text.size());
  return {head / count, feed_forward / count};
}

/// (I + p·D·C)⁻¹, undefined for p = 0.
at::Tensor shield_of(const at::Tensor& directions, double protection) {
  if (protection == 0 || !directions.defined()) return {};
  const auto width = directions.size(0);
  const auto scaled = directions * (protection * static_cast<double>(width));
  return at::linalg_inv(at::eye(width, directions.options()) + scaled);
}

/// The nearest matrix of that rank (Eckart and Young 1936); 0: the matrix.
at::Tensor cut_to_rank(const at::Tensor& matrix, std::int64_t rank) {
  if (rank == 0 || rank >= std::min(matrix.size(0), matrix.size(1))) return matrix;
  const auto [u, s, vh] = at::linalg_svd(matrix.to(at::kDouble), false);
  const auto left = u.slice(1, 0, rank) * s.slice(0, 0, rank);
  return at::matmul(left, vh.slice(0, 0, rank)).to(matrix.scalar_type());
}

/// What was learned since memories and projections started, kept away from the directions of
/// `guarded` that strongly, the change of projections cut to its rank.
Learned changes_of(const Learned& learned, const Learned& starts, const Directions& directions,
                   double protection, std::int64_t rank) {
  Learned changes;
  for (std::size_t n = 0; n < starts.memories.size(); ++n) {
    const auto& start = starts.memories[n];
    changes.memories.push_back(start.defined() ? learned.memories[n] - start : start);
  }
  if (starts.head.defined()) {
    changes.head = learned.head - starts.head;
    if (const auto shield = shield_of(directions.head, protection); shield.defined()) {
      changes.head = at::matmul(shield.to(changes.head.scalar_type()), changes.head);
    }
  }
  if (starts.feed_forward.defined()) {
    auto change = learned.feed_forward;
    if (const auto shield = shield_of(directions.feed_forward, protection); shield.defined()) {
      change = at::matmul(change, shield.to(change.scalar_type()));
    }
    changes.feed_forward = cut_to_rank(change, rank);
  }
  return changes;
}

/// Shares of what was learned by the loss, at the head and in the feed-forward. Where both are
/// there they have the same or one of them none: they learn much the same.
std::vector<std::pair<double, double>> shares_of_both(bool head, bool feed_forward) {
  std::vector<std::pair<double, double>> shares = {{0.0, 0.0}};
  for (const double share : {0.5, 1.0}) {
    if (head) shares.emplace_back(share, 0.0);
    if (feed_forward) shares.emplace_back(0.0, share);
    if (head && feed_forward) shares.emplace_back(share, share);
  }
  return shares;
}

/// What is tried: the parts that model and session have, by themselves and together.
std::vector<ConsolidationTrial> plan(const LanguageModelImpl& model,
                                     const ConsolidationOptions& options, bool feed_forward) {
  const bool memory = model.config().memory && options.memory;
  const bool head = model.config().fast_head && options.head;
  if (!memory && !head && !feed_forward)
    throw Error("consolidate: the model has no memory that is to be consolidated");
  std::vector<double> protections = {0.0};
  if (!options.guarded.empty()) protections = {0.0, 1.0, 10.0};
  std::vector<ConsolidationTrial> trials;
  for (const double memory_share : memory ? std::vector{0.0, 1.0} : std::vector{0.0}) {
    for (const auto& [head_share, layer_share] : shares_of_both(head, feed_forward)) {
      const double by_loss = head_share + layer_share;
      for (const double protection : protections) {
        if (memory_share + by_loss == 0 || (by_loss == 0 && protection > 0)) continue;
        trials.push_back({.memory_share = memory_share,
                          .head_share = head_share,
                          .protection = protection,
                          .feed_forward_share = layer_share});
      }
    }
  }
  return trials;
}

/// What is tried on: the text, and a session that has not read it.
struct TrialText {
  std::string text;
  std::optional<Session> learner;  // none: the session itself
};

TrialText trial_text(const Session& session, const ConsolidationOptions& options) {
  if (!options.trial.empty()) return {options.trial, std::nullopt};
  const auto& log = session.log();
  const auto tail = std::min((log.size()) / 10, kMostTrialTokens);
  if (tail < kLeastTrialTokens) {
    throw Error(fmt::format(
        "consolidate: a tenth of the session's text is {} bytes, fewer than a trial needs ({}); "
        "give a text of the kind that it learned, which it has not read, as `trial`",
        tail, kLeastTrialTokens));
  }
  const auto text = io::ByteTokenizer().decode(log.tokens(log.end() - tail, log.end()));
  Session learner = session.fork();
  learner.rollback(log.end() - tail);
  return {text, std::move(learner)};
}

void measure(const Model& model, const std::string& trial, const std::string& guarded,
             ConsolidationTrial& out) {
  out.trial_bits = Session(model).score(trial);
  if (!guarded.empty()) out.guarded_bits = Session(model).score(guarded);
}

void report(const Progress& progress, std::size_t done, std::size_t total) {
  if (!progress || progress(static_cast<std::int64_t>(done), static_cast<std::int64_t>(total)))
    return;
  if (done < total) throw Cancelled("consolidate: stopped; nothing has changed");
}

const ConsolidationTrial* best_of(const Consolidation& result,
                                  const ConsolidationOptions& options) {
  const ConsolidationTrial* best = nullptr;
  for (const auto& trial : result.trials) {
    const bool allowed = trial.trial_bits < result.before.trial_bits &&
                         trial.guarded_bits <= result.before.guarded_bits + options.tolerance;
    if (allowed && (best == nullptr || trial.trial_bits < best->trial_bits)) best = &trial;
  }
  return best;
}

[[noreturn]] void refuse(const Consolidation& result, const ConsolidationOptions& options) {
  const auto cheapest =
      std::ranges::min_element(result.trials, {}, &ConsolidationTrial::trial_bits);
  std::string guarded;
  if (!options.guarded.empty()) {
    guarded = fmt::format(", the guarded text {:.4f} for {:.4f} (it may cost {:.4f} more)",
                          cheapest->guarded_bits, result.before.guarded_bits, options.tolerance);
  }
  throw Error(fmt::format(
      "consolidate: refused; at best the trial text costs {:.4f} bits per byte for {:.4f} before{}",
      cheapest->trial_bits, result.before.trial_bits, guarded));
}

}  // namespace

Consolidation consolidate(const Session& session, const ConsolidationOptions& options,
                          const Progress& progress) {
  if (!(options.tolerance >= 0)) {
    throw Error(
        fmt::format("consolidate: tolerance must be at least 0, got {}", options.tolerance));
  }
  if (options.rank < 0) {
    throw Error(fmt::format("consolidate: rank must be at least 0, got {}", options.rank));
  }
  const at::NoGradGuard no_gradient;
  const Model base = session.model();
  const bool feed_forward = options.feed_forward && session.options().end_to_end.has_value();
  Consolidation result;
  result.trials = plan(*base, options, feed_forward);
  const TrialText on = trial_text(session, options);
  const auto layers = base->config().layers;
  const Learned tried = learned_by(on.learner ? *on.learner : session, layers);
  const auto directions =
      options.guarded.empty() ? Directions() : directions_of(*base, options.guarded);
  Candidate candidate(*base, options, feed_forward);
  measure(base, on.text, options.guarded, result.before);
  std::map<double, std::optional<Learned>> by_protection;
  for (std::size_t i = 0; i < result.trials.size(); ++i) {
    report(progress, i, result.trials.size());
    auto& trial = result.trials[i];
    auto& changes = by_protection[trial.protection];
    if (!changes) {
      changes = changes_of(tried, candidate.starts(), directions, trial.protection, options.rank);
    }
    candidate.set(*changes, trial);
    measure(candidate.model(), on.text, options.guarded, trial);
  }
  const auto* best = best_of(result, options);
  if (best == nullptr) refuse(result, options);
  result.chosen = *best;
  candidate.set(changes_of(learned_by(session, layers), candidate.starts(), directions,
                           best->protection, options.rank),
                *best);
  result.model = candidate.model();
  report(progress, result.trials.size(), result.trials.size());
  return result;
}

Session rebase(const Session& session, Model model, const Progress& progress) {
  return Session::from_log(std::move(model), session.log(), session.options(), progress);
}

}  // namespace fastweights
