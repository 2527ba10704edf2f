#include "session_steps.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>

#include "fastweights/core/error.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/nn/language_model.hpp"
#include "place.hpp"
#include "recollection.hpp"

namespace fastweights::detail {
namespace {

const WriteOptions& checked(const WriteOptions& options) {
  if (options.max_tokens < 0) {
    throw Error("session: max_tokens must be at least 0, got " +
                std::to_string(options.max_tokens));
  }
  if (options.ahead < 0 || options.ahead > 64) {
    throw Error("session: ahead must be in [0, 64], got " + std::to_string(options.ahead));
  }
  if (options.guess && options.ahead == 0) {
    throw Error("session: guess has no use where ahead is 0");
  }
  if (std::any_of(options.stop.begin(), options.stop.end(), std::mem_fn(&std::string::empty))) {
    throw Error("session: a stop string must not be empty");
  }
  check_sampling_options({options.temperature, options.top_k, options.top_p});
  return options;
}

std::int64_t bytes_of(const Place& place) {
  return tensor_bytes(place) + (place.recollection ? place.recollection->store().bytes() : 0);
}

}  // namespace

Writing::Writing(const Session& session, const WriteOptions& options)
    : options_(checked(options)),
      replay_(*session.model_, session.options_, session.place_),
      generator_(options.seed ? Generator{.seed = *options.seed} : session.generator_),
      journal_(*session.journal_),
      guesses_(options, session.log_),
      begin_(session.position()) {}

std::optional<WrittenToken> Writing::draw() {
  if (is_over()) return {};
  const at::Tensor logits = replay_.logits().cpu();
  const std::span<const float> span(logits.const_data_ptr<float>(),
                                    static_cast<std::size_t>(logits.numel()));
  const Generator before = generator_;
  try {
    const std::int64_t token = sample_token(
        span, {options_.temperature, options_.top_k, options_.top_p}, generator_.uniform());
    written_.push_back(token);
    return WrittenToken{&replay_, token, guess(token)};
  } catch (...) {  // logits that are no numbers: the session keeps what was written until here
    generator_ = before;
    stop_with(std::current_exception());
    return {};
  }
}

/// What may come after a token that was drawn.
std::span<const std::int64_t> Writing::guess(std::int64_t token) {
  const bool foreseen = replay_.has_read(token);
  guesses_.append(token, foreseen);
  if (foreseen) return {};
  const std::int64_t left = options_.max_tokens - std::ssize(written_);
  try {
    return guesses_.next(std::min(left, Replay::most_guesses(begin_ + std::ssize(written_))));
  } catch (...) {
    stop_with(std::current_exception());
    return {};
  }
}

void Writing::stop_with(std::exception_ptr thrown) {
  thrown_ = std::move(thrown);
  more_ = false;
}

void Writing::accept() {
  replay_.checkpoint_written(begin_ + std::ssize(written_), journal_);
  text_ += io::ByteTokenizer().decode(std::span(written_).last(1));
  if (std::any_of(options_.stop.begin(), options_.stop.end(),
                  [&](const std::string& stop) { return text_.ends_with(stop); })) {
    more_ = false;
  }
}

void Writing::ask() {
  if (!wants_to_ask()) return;
  try {
    if (!options_.on_token(io::ByteTokenizer().decode(std::span(written_).last(1)))) more_ = false;
  } catch (...) {
    stop_with(std::current_exception());
  }
}

std::string Writing::finish(Session& session) {
  if (!written_.empty()) {
    session.log_.start_call(CallKind::kWritten, written_, options_.seed);
    session.place_ = replay_.place();
    session.generator_ = generator_;
    session.journal_ = std::make_shared<Journal>(std::move(journal_));
  }
  if (thrown_) std::rethrow_exception(thrown_);
  return std::move(text_);
}

void SessionSteps::read_piece(Session& session, std::string_view piece, bool first) {
  session.read_piece(io::ByteTokenizer().encode(piece), first, {});
}

std::int64_t SessionSteps::bytes(const Session& session) {
  return bytes_of(session.place_) + (session.base_ ? bytes_of(*session.base_) : 0) +
         session.journal_->bytes() + static_cast<std::int64_t>(session.log_.bytes());
}

void throw_stopped(std::size_t done, std::size_t total) {
  throw Cancelled("session: stopped after " + std::to_string(done) + " of " +
                  std::to_string(total) + " tokens");
}

}  // namespace fastweights::detail
