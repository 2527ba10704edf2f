#include "fastweights/session/session.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <numeric>
#include <span>
#include <utility>

#include "decoder.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/io/mapped_file.hpp"
#include "fastweights/io/quote.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/session/generator.hpp"
#include "fastweights/session/state_file.hpp"
#include "feed_forward_learner.hpp"
#include "fingerprint.hpp"
#include "journal.hpp"
#include "least_squares.hpp"
#include "place.hpp"
#include "recollection.hpp"
#include "replay.hpp"
#include "session_steps.hpp"

namespace fastweights {
namespace {

using Model = std::shared_ptr<const nn::LanguageModelImpl>;
using detail::bits_of;
using detail::Checkpoint;
using detail::Place;
using detail::Recollection;
using detail::Replay;
using detail::tensors_of;
using detail::to_tensor;
using nn::NamedTensors;
using Tokens = std::vector<std::int64_t>;

// ---- one step ---------------------------------------------------------------------------------

at::Device device_of(const nn::LanguageModelImpl& model) {
  return model.embedding->weight.device();
}

/// A model that a session can run: of bytes, and with nothing left to chance.
Model checked(Model model) {
  if (!model) throw Error("session: there is no model");
  if (model->is_training()) throw Error("session: the model must be in evaluation mode (eval())");
  if (model->config().vocabulary_size != io::ByteTokenizer::kVocabularySize) {
    throw Error("session: the model's vocabulary must be the 256 bytes, got " +
                std::to_string(model->config().vocabulary_size) + " tokens");
  }
  return model;
}

const SessionOptions& checked(const SessionOptions& options) {
  if (options.piece < 1) {
    throw Error("session: piece must be at least 1, got " + std::to_string(options.piece));
  }
  if (options.journal_bytes < 0) {
    throw Error("session: journal_bytes must be at least 0, got " +
                std::to_string(options.journal_bytes));
  }
  check_write_policy(options.policy);
  if (options.end_to_end) check_end_to_end_options(*options.end_to_end);
  return options;
}

SessionOptions checked(SessionOptions options, const nn::LanguageModelImpl& model) {
  if (options.protection) check_protection(*options.protection, model);
  return options;
}

Place fresh_place(const nn::LanguageModelImpl& model, const SessionOptions& session) {
  const at::NoGradGuard no_gradient;  // a matrix that memories begin with may be trained
  const auto options = at::TensorOptions(at::kFloat).device(device_of(model));
  Place place{model.initial_state(1), at::zeros({model.config().vocabulary_size}, options)};
  if (session.store) place.recollection = std::make_shared<Recollection>(*session.store, model);
  if (session.end_to_end) {
    place.end_to_end = detail::initial_end_to_end(*session.end_to_end, model);
  }
  if (session.policy.ridge > 0.0 && model.config().memory) {
    place.covariances = detail::initial_covariances(session.policy.ridge, model);
  }
  return place;
}

void append(std::vector<float>& out, const at::Tensor& values) {
  const std::span<const float> span(values.const_data_ptr<float>(),
                                    static_cast<std::size_t>(values.numel()));
  out.insert(out.end(), span.begin(), span.end());
}

// ---- texts -------------------------------------------------------------------------------------

/// Cuts a text into pieces of tokens and calls `run(tokens, first)` on each.
template <class Run>
void for_each_piece(std::string_view text, std::int64_t piece, const Progress& progress, Run run) {
  const auto step = static_cast<std::size_t>(piece);
  for (std::size_t done = 0; done < text.size();) {
    const Tokens tokens = io::ByteTokenizer().encode(text.substr(done, step));
    run(tokens, done == 0);
    done += tokens.size();
    const bool go_on = !progress || progress(static_cast<std::int64_t>(done),
                                             static_cast<std::int64_t>(text.size()));
    if (!go_on && done < text.size()) detail::throw_stopped(done, text.size());
  }
}

// ---- state files -------------------------------------------------------------------------------

at::Tensor to_tensor(const Generator& generator) {
  const std::array<std::int64_t, 2> fields = {static_cast<std::int64_t>(generator.seed),
                                              static_cast<std::int64_t>(generator.draws)};
  return to_tensor(fields);
}

io::ScalarType stored_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return io::ScalarType::F64;
    case at::kFloat: return io::ScalarType::F32;
    case at::kHalf: return io::ScalarType::F16;
    case at::kBFloat16: return io::ScalarType::BF16;
    case at::kLong: return io::ScalarType::I64;
    default:
      throw Error(std::string("session: a state of type ") + c10::toString(tensor.scalar_type()) +
                  " cannot be saved");
  }
}

io::TensorData stored(const std::string& name, const at::Tensor& tensor) {
  return {name,
          stored_type(tensor),
          tensor.sizes().vec(),
          {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()}};
}

/// The stored tensor of that name, which must be just like `like`.
at::Tensor restored(const std::string& name, const at::Tensor& like,
                    std::span<const io::TensorData> tensors) {
  const auto from = std::ranges::find(tensors, name, &io::TensorData::name);
  if (from == tensors.end() || from->type != stored_type(like) || like.sizes() != from->shape) {
    throw StateMismatch("the state file has no tensor " + name + " like the model's");
  }
  at::Tensor host = at::empty(like.sizes(), like.options().device(at::kCPU));
  if (!from->bytes.empty()) std::memcpy(host.data_ptr(), from->bytes.data(), from->bytes.size());
  return host.to(like.device());
}

constexpr const char* kBasePrefix = "base.";
constexpr const char* kContentPrefix = "content.";

std::string checkpoint_prefix(std::size_t i) { return "checkpoints." + std::to_string(i) + "."; }

/// Name of what a place keeps of its write policy's work, where that has caps.
constexpr const char* kCappedNorms = "policy.capped_norms";

/// The same of a protection; and the protection itself.
constexpr const char* kRefusedWrites = "protection.refused_writes";
constexpr const char* kProjector = "protection.projectors.";
constexpr const char* kLeastFree = "protection.least_free";

bool same_tensors(const Place& a, const Place& b) {
  return std::ranges::equal(tensors_of(a), tensors_of(b), [](const auto& x, const auto& y) {
    return x.first == y.first && at::equal(x.second, y.second);
  });
}

/// What the views of a file's tensors show.
struct Kept {
  std::vector<at::Tensor> tensors;
  std::vector<StoredTensor> stored;
};

void store(std::vector<StoredTensor> tensors, const std::string& prefix,
           std::vector<io::TensorData>& out, Kept& kept) {
  for (StoredTensor& tensor : tensors) {
    kept.stored.push_back(std::move(tensor));
    out.push_back(kept.stored.back().view());
    out.back().name = prefix + out.back().name;
  }
}

/// Adds views of a place's tensors to `out`; of an exact store what is the place's own.
void store_place(const Place& place, const SessionOptions& options, const std::string& prefix,
                 std::vector<io::TensorData>& out, Kept& kept) {
  NamedTensors tensors = tensors_of(place);
  if (options.policy.caps_norms()) {
    tensors.emplace_back(kCappedNorms, to_tensor({&place.capped_norms, 1}));
  }
  if (options.protection) {
    tensors.emplace_back(kRefusedWrites, to_tensor({&place.refused_writes, 1}));
  }
  for (const auto& [name, tensor] : tensors) {
    kept.tensors.push_back(tensor.cpu().contiguous());
    out.push_back(stored(prefix + name, kept.tensors.back()));
  }
  if (place.recollection) store(place.recollection->place_tensors(), prefix, out, kept);
}

void store_protection(const Protection& protection, std::vector<io::TensorData>& out, Kept& kept) {
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    kept.tensors.push_back(tensor.cpu().contiguous());
    out.push_back(stored(name, kept.tensors.back()));
  };
  for (std::size_t layer = 0; layer < protection.projectors.size(); ++layer) {
    add(kProjector + std::to_string(layer), protection.projectors[layer]);
  }
  add(kLeastFree, at::full({1}, protection.least_free, at::kDouble));
}

/// The protection that is stored among the tensors; null if there is none.
std::shared_ptr<const Protection> restored_protection(const nn::LanguageModelConfig& config,
                                                      std::span<const io::TensorData> tensors) {
  if (std::ranges::find(tensors, kLeastFree, &io::TensorData::name) == tensors.end())
    return nullptr;
  auto protection = std::make_shared<Protection>();
  protection->least_free =
      restored(kLeastFree, at::zeros({1}, at::kDouble), tensors).item<double>();
  const at::Tensor like = at::zeros(
      {config.memory_value_heads, config.memory_key_size, config.memory_key_size}, at::kFloat);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    protection->projectors.push_back(restored(kProjector + std::to_string(layer), like, tensors));
  }
  return protection;
}

/// Adds what the exact store of a place holds, and what it has dropped since the checkpoints of the
/// same text. Returns the checkpoints whose stores are wholly in it: all, but where a budget is
/// smaller than what was read between two of them.
std::span<const std::shared_ptr<const Checkpoint>> store_content(
    const Place& place, std::span<const std::shared_ptr<const Checkpoint>> checkpoints,
    const std::string& prefix, std::vector<io::TensorData>& out, Kept& kept) {
  if (!place.recollection) return checkpoints;
  ExactStore content = place.recollection->store();
  std::size_t first = checkpoints.size();
  while (first > 0 && content.extend_back(checkpoints[first - 1]->place.recollection->store())) {
    --first;
  }
  store(content.tensors(), prefix + kContentPrefix, out, kept);
  return checkpoints.subspan(first);
}

/// The exact store with the content that is stored with that prefix; none if there is none.
std::optional<ExactStore> restored_content(const nn::LanguageModelConfig& config,
                                           const std::string& prefix,
                                           std::span<const io::TensorData> tensors) {
  const auto own = detail::with_prefix(prefix + kContentPrefix, tensors);
  if (own.empty()) return std::nullopt;
  return ExactStore::from_tensors(config.width, config.vocabulary_size, own);
}

/// The place with that prefix, all of whose tensors are like those of `like`.
Place restored_place(const Place& like, const SessionOptions& options, const std::string& prefix,
                     std::span<const io::TensorData> tensors, std::int64_t position,
                     std::int64_t limited_writes) {
  NamedTensors own = tensors_of(like);
  for (auto& [name, tensor] : own) tensor = restored(prefix + name, tensor, tensors);
  Place place = detail::with_tensors(like, own);
  place.recollection = nullptr;
  place.limited_writes = limited_writes;
  const auto count = [&](const char* name) {
    return restored(prefix + name, at::zeros({1}, at::kLong), tensors).item<std::int64_t>();
  };
  if (options.policy.caps_norms()) place.capped_norms = count(kCappedNorms);
  if (options.protection) place.refused_writes = count(kRefusedWrites);
  if (place.state.position.item<std::int64_t>() != position) {
    throw FileError("state file: malformed: its tensors do not belong to its log");
  }
  return place;
}

}  // namespace

// ---- the session -------------------------------------------------------------------------------

Session::Session(Model model, const SessionOptions& options)
    : model_(checked(std::move(model))),
      options_(checked(options, *model_)),
      place_(fresh_place(*model_, checked(options))),
      journal_(std::make_shared<detail::Journal>(options.journal_bytes)),
      generator_{.seed = options.seed},
      log_(model_->config().vocabulary_size, {.generator = {.seed = options.seed}}) {}

bool Session::fused() const { return detail::Decoder::of(*model_) != nullptr; }

detail::Journal& Session::journal() { return detail::own(journal_); }

Place Session::base_place() const { return base_ ? *base_ : fresh_place(*model_, options_); }

// ---- reading and writing -----------------------------------------------------------------------

void Session::read_piece(std::span<const std::int64_t> tokens, bool first,
                         const AfterPiece& after) {
  Replay replay(*model_, options_, place_);
  const at::Tensor rows = replay.read(tokens);
  if (first) {
    log_.start_call(CallKind::kRead, tokens);
  } else {
    log_.extend_call(tokens);
  }
  const at::Tensor before = place_.logits;
  place_ = replay.place();
  journal().add(log_.end(), place_);
  if (after) after(tokens, before, rows);
}

void Session::read_pieces(std::string_view text, const Progress& progress,
                          const AfterPiece& after) {
  const c10::InferenceMode guard;
  for_each_piece(text, options_.piece, progress,
                 [&](const Tokens& tokens, bool first) { read_piece(tokens, first, after); });
}

void Session::read(std::string_view text, const Progress& progress) {
  read_pieces(text, progress, {});
}

std::vector<float> Session::read_and_score(std::string_view text, const Progress& progress) {
  std::vector<float> bits;
  bits.reserve(text.size());
  read_pieces(text, progress, [&](auto tokens, const at::Tensor& before, const at::Tensor& rows) {
    append(bits, bits_of(tokens, before, rows));
  });
  return bits;
}

double Session::score(std::string_view text, const Progress& progress) const {
  if (text.empty()) throw Error("session: an empty text has no bits per byte");
  const std::vector<float> bits = token_bits(text, progress);
  return std::accumulate(bits.begin(), bits.end(), 0.0) / static_cast<double>(text.size());
}

std::vector<float> Session::token_bits(std::string_view text, const Progress& progress) const {
  const c10::InferenceMode guard;
  Replay replay(*model_, options_, place_);
  std::vector<float> bits;
  bits.reserve(text.size());
  for_each_piece(text, options_.piece, progress, [&](const Tokens& tokens, bool) {
    const at::Tensor before = replay.place().logits;
    append(bits, bits_of(tokens, before, replay.read(tokens)));
  });
  return bits;
}

std::string Session::write(const WriteOptions& options) {
  const c10::InferenceMode guard;
  detail::Writing writing(*this, options);
  while (const auto token = writing.draw()) {
    Replay::write_each(*model_, {&*token, 1});
    writing.accept();
    writing.ask();
  }
  return writing.finish(*this);
}

// ---- going back --------------------------------------------------------------------------------

Mark Session::mark() {
  if (log_.size() > 0) journal().add(position(), place_);
  return marks_.add(position());
}

std::vector<Mark> Session::marks() const {
  std::vector<Mark> out;
  for (const MarkEntry& entry : marks_.entries()) {
    if (entry.status == MarkStatus::kValid) out.push_back(entry.mark);
  }
  return out;
}

std::int64_t Session::resolve(const TextPoint& point, const char* name) const {
  if (point.mark_) return marks_.position(*point.mark_);
  if (point.position_ < log_.start() || point.position_ > log_.end()) {
    const std::string committed =
        "; what came before " + std::to_string(log_.start()) + " is committed";
    throw Error("session: " + std::string(name) + " must be in [" + std::to_string(log_.start()) +
                ", " + std::to_string(log_.end()) + "], got " + std::to_string(point.position_) +
                (point.position_ < log_.start() && point.position_ >= 0 ? committed : ""));
  }
  return point.position_;
}

void Session::check_order(std::int64_t from, std::int64_t to) const {
  if (from > to) {
    throw Error("session: a span must not end before it begins, got [" + std::to_string(from) +
                ", " + std::to_string(to) + ")");
  }
}

/// The session becomes that of `log`, which is like the present one before `unchanged`.
void Session::edit(SessionLog log, MarkTable marks, std::int64_t unchanged,
                   const Progress& progress) {
  const c10::InferenceMode guard;
  const bool same = unchanged == log.end() && unchanged == log_.end();
  if (!same) {
    auto journal = std::make_shared<detail::Journal>(*journal_);
    journal->keep_if([&](std::int64_t position) {
      return position <= unchanged && log.is_boundary(position, options_.piece);
    });
    const Checkpoint* start = journal->last();
    const std::int64_t begin = start ? start->position : log.start();
    Replay replay(*model_, options_, start ? start->place : base_place());
    replay.run(log, begin, options_.piece, *journal, progress);
    place_ = replay.place();
    journal_ = std::move(journal);
    generator_ = log.generator();
  }
  log_ = std::move(log);
  marks_ = std::move(marks);
}

void Session::rollback(TextPoint to, const Progress& progress) {
  const std::int64_t end = resolve(to, "the position to roll back to");
  SessionLog log = log_;
  MarkTable marks = marks_;
  log.truncate(end);
  marks.truncate(end);
  edit(std::move(log), std::move(marks), end, progress);
}

void Session::feedback(TextPoint since, float r, const Progress& progress) {
  feedback(since, position(), r, progress);
}

void Session::feedback(TextPoint from, TextPoint to, float r, const Progress& progress) {
  const std::int64_t begin = resolve(from, "the begin of feedback");
  const std::int64_t end = resolve(to, "the end of feedback");
  check_order(begin, end);
  if (!(r >= 0.0F && r <= 2.0F)) {
    throw Error("session: the strength of feedback must be in [0, 2], got " + std::to_string(r));
  }
  SessionLog log = log_;
  const std::int64_t changed = log.set_strength(begin, end, r);
  edit(std::move(log), marks_, changed == end ? position() : changed, progress);
}

void Session::reward(float r, double half_life, const Progress& progress) {
  if (!(r >= -1.0F && r <= 1.0F)) {
    throw Error("session: a reward must be in [-1, 1], got " + std::to_string(r));
  }
  if (!(half_life > 0.0)) {
    throw Error("session: the half-life of a reward must be above 0, got " +
                std::to_string(half_life));
  }
  constexpr double kSteps = 64.0;
  const auto step_at = [&](std::int64_t back) {
    return std::round(kSteps * r * std::exp2(-static_cast<double>(back) / half_life));
  };
  SessionLog log = log_;
  std::int64_t unchanged = log.end();
  for (std::int64_t end = log.end(); end > log.start();) {
    const double step = step_at(log.end() - end);
    if (step == 0.0) break;
    std::int64_t begin = end - 1;
    while (begin > log.start() && step_at(log.end() - begin) == step) --begin;
    const auto strength = static_cast<float>(1.0 + step / kSteps);
    const std::int64_t changed = log.set_strength(begin, end, strength);
    if (changed != end) unchanged = changed;
    end = begin;
  }
  edit(std::move(log), marks_, unchanged, progress);
}

void Session::correct(TextPoint since, std::string_view better, float r, const Progress& progress) {
  Session next = *this;
  next.feedback(since, r, progress);
  next.read(better, progress);
  *this = std::move(next);
}

void Session::revoke(TextPoint from, TextPoint to, const Progress& progress) {
  const std::int64_t begin = resolve(from, "the begin of what is revoked");
  const std::int64_t end = resolve(to, "the end of what is revoked");
  check_order(begin, end);
  if (begin == end) return;
  SessionLog log = log_;
  MarkTable marks = marks_;
  log.erase(begin, end);
  marks.erase(begin, end);
  edit(std::move(log), std::move(marks), begin, progress);
}

void Session::merge(const Session& other, const Progress& progress) {
  const bool same_model = model_ == other.model_ || detail::model_fingerprint(*model_) ==
                                                        detail::model_fingerprint(*other.model_);
  if (!same_model) throw Error("session: only sessions on the same model can be merged");
  const bool same_base =
      log_.base() == other.log_.base() && (log_.start() == 0 || same_tensors(*base_, *other.base_));
  if (!same_base) {
    throw Error(
        "session: only sessions that begin at the same place can be merged; one of them "
        "has committed what the other has not");
  }
  SessionLog log = log_;
  log.append(other.log_, log_.common_end(other.log_));
  if (log.end() == log_.end()) return;
  journal().add(position(), place_);
  edit(std::move(log), marks_, position(), progress);
}

void Session::commit() {
  auto base = std::make_shared<const Place>(place_);
  auto journal = std::make_shared<detail::Journal>(options_.journal_bytes);
  marks_.commit();
  log_.commit();
  base_ = std::move(base);
  journal_ = std::move(journal);
}

SessionReport Session::report() const {
  return {.read = log_.read(),
          .written = log_.written(),
          .committed = log_.start(),
          .checkpoints = std::ssize(journal_->checkpoints()),
          .checkpoint_bytes = journal_->bytes(),
          .log_bytes = static_cast<std::int64_t>(log_.bytes()),
          .marks = std::ssize(marks()),
          .limited_writes = place_.limited_writes,
          .capped_norms = place_.capped_norms,
          .refused_writes = place_.refused_writes,
          .store_tokens = place_.recollection ? place_.recollection->store().size() : 0,
          .store_bytes = place_.recollection ? place_.recollection->store().bytes() : 0};
}

Session Session::from_log(Model model, const SessionLog& log, const SessionOptions& options,
                          const Progress& progress) {
  if (log.start() != 0) {
    throw Error("session: a log whose first " + std::to_string(log.start()) +
                " tokens were committed cannot be replayed");
  }
  SessionOptions own = options;
  own.seed = log.base().generator.seed;
  Session session(std::move(model), own);
  if (log.vocabulary_size() != session.log_.vocabulary_size()) {
    throw Error("session: the log's vocabulary must be the model's " +
                std::to_string(session.log_.vocabulary_size()) + " tokens, got " +
                std::to_string(log.vocabulary_size()));
  }
  session.edit(log, MarkTable(), 0, progress);
  return session;
}

// ---- looking -----------------------------------------------------------------------------------

at::Tensor Session::logits() const { return place_.logits.cpu().clone(); }

NamedTensors Session::state() const {
  NamedTensors tensors = tensors_of(place_);
  for (auto& [name, tensor] : tensors) tensor = tensor.clone();
  tensors.emplace_back("generator", to_tensor(generator_));
  if (!place_.recollection) return tensors;
  for (auto& each : detail::to_named_tensors(place_.recollection->tensors())) {
    tensors.push_back(std::move(each));
  }
  return tensors;
}

// ---- state files -------------------------------------------------------------------------------

void Session::save(const std::filesystem::path& path) const {
  StateFile file{.model = detail::model_fingerprint(*model_),
                 .piece = options_.piece,
                 .journal_bytes = options_.journal_bytes,
                 .limited_writes = place_.limited_writes,
                 .base_limited_writes = base_ ? base_->limited_writes : 0,
                 .policy = options_.policy,
                 .end_to_end = options_.end_to_end,
                 .log = log_,
                 .marks = {marks_.entries().begin(), marks_.entries().end()},
                 .checkpoints = {},
                 .tensors = {}};
  Kept kept;
  if (options_.protection) store_protection(*options_.protection, file.tensors, kept);
  store_place(place_, options_, "", file.tensors, kept);
  if (base_) {
    store_place(*base_, options_, kBasePrefix, file.tensors, kept);
    store_content(*base_, {}, kBasePrefix, file.tensors, kept);
  }
  std::span<const std::shared_ptr<const Checkpoint>> checkpoints = journal_->checkpoints();
  checkpoints = store_content(place_, checkpoints, "", file.tensors, kept);
  for (const auto& checkpoint : checkpoints) {
    const std::string prefix = checkpoint_prefix(file.checkpoints.size());
    file.checkpoints.push_back({checkpoint->position, checkpoint->place.limited_writes});
    if (checkpoint->position == position()) continue;  // its tensors are the session's own
    store_place(checkpoint->place, options_, prefix, file.tensors, kept);
  }
  write_state_file(path, file);
}

void Session::restore(const StateFile& file) {
  const c10::InferenceMode guard;
  const auto is_present = [&](const StoredCheckpoint& each) {
    return each.position == file.log.end();
  };
  const bool base = file.log.start() > 0;
  const std::size_t places = 1 + (base ? 1 : 0) + file.checkpoints.size() -
                             std::ranges::count_if(file.checkpoints, is_present);
  const auto content = restored_content(model_->config(), "", file.tensors);
  std::size_t each = tensors_of(place_).size() + (options_.policy.caps_norms() ? 1 : 0) +
                     (options_.protection ? 1 : 0);
  std::size_t expected = options_.protection ? options_.protection->projectors.size() + 1 : 0;
  if (content) {
    options_.store = content->options();
    place_ = fresh_place(*model_, options_);
    each += place_.recollection->place_tensors().size();
    expected += (base ? 2 : 1) * content->tensors().size();
  }
  expected += places * each;
  if (file.tensors.size() != expected) {
    throw StateMismatch("the state file has " + std::to_string(file.tensors.size()) + " tensors, " +
                        std::to_string(places) + " states of the model " +
                        std::to_string(expected));
  }
  const auto restored = [&](const std::string& prefix, std::int64_t position,
                            std::int64_t limited_writes, const std::optional<ExactStore>& stored) {
    Place place = restored_place(place_, options_, prefix, file.tensors, position, limited_writes);
    if (!stored) return place;
    place.recollection = std::make_shared<Recollection>(
        Recollection::from_tensors(*stored, *model_, detail::with_prefix(prefix, file.tensors)));
    if (place.recollection->store().size() != position) {
      throw FileError("state file: malformed: its exact store does not belong to its log");
    }
    return place;
  };
  Place place = restored("", file.log.end(), file.limited_writes, content);
  if (base) {
    base_ = std::make_shared<const Place>(
        restored(kBasePrefix, file.log.start(), file.base_limited_writes,
                 restored_content(model_->config(), kBasePrefix, file.tensors)));
  }
  for (std::size_t i = 0; i < file.checkpoints.size(); ++i) {
    const auto& [position, limited_writes] = file.checkpoints[i];
    const std::string prefix = checkpoint_prefix(i);
    journal().add(position, is_present(file.checkpoints[i])
                                ? place
                                : restored(prefix, position, limited_writes, content));
  }
  place_ = std::move(place);
  log_ = file.log;
  marks_ = MarkTable::from_entries(file.marks, log_.start(), log_.end());
  generator_ = log_.generator();
}

Session Session::load(const std::filesystem::path& path, Model model) {
  const io::MappedFile mapped(path);
  try {
    const StateFile file = parse_state_file(mapped.bytes());
    const auto protection = restored_protection(checked(model)->config(), file.tensors);
    Session session(std::move(model), {.piece = file.piece,
                                       .seed = file.log.base().generator.seed,
                                       .journal_bytes = file.journal_bytes,
                                       .policy = file.policy,
                                       .end_to_end = file.end_to_end,
                                       .protection = protection});
    const std::string fingerprint = detail::model_fingerprint(*session.model_);
    if (file.model != fingerprint) {
      throw StateMismatch("the state belongs to another model: its fingerprint is " + file.model +
                          ", this model's is " + fingerprint);
    }
    session.restore(file);
    return session;
  } catch (const FileError& error) {
    throw FileError(io::quote(path.string()) + ": " + error.what());
  } catch (const StateMismatch& error) {
    throw StateMismatch(io::quote(path.string()) + ": " + error.what());
  }
}

}  // namespace fastweights
