#include "fastweights/session/log.hpp"

#include <algorithm>
#include <iterator>
#include <limits>
#include <string>
#include <utility>

#include "fastweights/core/error.hpp"
#include "fastweights/session/packed_tokens.hpp"

namespace fastweights {
namespace {

constexpr std::int64_t kMaxVocabulary = std::int64_t{1} << 32;

std::size_t token_width(std::int64_t vocabulary_size) {
  if (vocabulary_size < 1 || vocabulary_size > kMaxVocabulary) {
    throw Error("session log: vocabulary_size must be in [1, 2^32], got " +
                std::to_string(vocabulary_size));
  }
  return static_cast<std::size_t>(detail::token_bytes(vocabulary_size));
}

/// The first of so many packed tokens that is not in the vocabulary; `count` if all are.
std::size_t find_unknown(const std::byte* packed, std::size_t width, std::size_t count,
                         std::int64_t vocabulary_size) {
  std::size_t i = 0;
  const auto bytes = static_cast<std::int64_t>(width);
  while (i < count && detail::load_token(packed + i * width, bytes) < vocabulary_size) ++i;
  return i;
}

/// Tokens that the calls claim to hold; throws unless they can be the calls of one log.
std::size_t count_tokens(std::span<const LogCall> calls, std::size_t limit) {
  std::size_t total = 0;
  for (const LogCall& call : calls) {
    if (call.kind != CallKind::kRead && call.kind != CallKind::kWritten) {
      throw Error("session log: a call has an unknown kind");
    }
    if (call.kind == CallKind::kRead && call.seed) {
      throw Error("session log: a read call has a seed");
    }
    if (call.tokens < 1 || static_cast<std::size_t>(call.tokens) > limit - total) {
      throw Error("session log: a call must hold between 1 and " + std::to_string(limit - total) +
                  " tokens, got " + std::to_string(call.tokens));
    }
    total += static_cast<std::size_t>(call.tokens);
  }
  return total;
}

std::string span_text(std::int64_t begin, std::int64_t end) {
  return "[" + std::to_string(begin) + ", " + std::to_string(end) + ")";
}

void check_base(const LogBase& base) {
  if (base.read < 0 || base.written < 0 || base.position < 0 || base.read > base.position ||
      base.position - base.read != base.written) {
    throw Error("session log: the " + std::to_string(base.position) + " tokens before it are not " +
                std::to_string(base.read) + " read and " + std::to_string(base.written) +
                " written ones");
  }
}

void check_strength(float strength) {
  if (!(strength >= 0.0F && strength <= 2.0F)) {
    throw Error("session log: a strength must be in [0, 2], got " + std::to_string(strength));
  }
}

/// Adds a span behind all others, joining it with the last one where that is the same.
void add_span(std::vector<StrengthSpan>& spans, const StrengthSpan& span) {
  if (span.begin >= span.end || span.strength == 1.0F) return;
  if (!spans.empty() && spans.back().end == span.begin && spans.back().strength == span.strength) {
    spans.back().end = span.end;
  } else {
    spans.push_back(span);
  }
}

void check_strengths(std::span<const StrengthSpan> spans, std::int64_t begin, std::int64_t end) {
  std::vector<StrengthSpan> joined;
  for (const StrengthSpan& span : spans) {
    check_strength(span.strength);
    if (span.begin < begin || span.begin >= span.end || span.end > end) {
      throw Error("session log: a strength is given for " + span_text(span.begin, span.end) +
                  ", which is no span in order of the log " + span_text(begin, end));
    }
    begin = span.end;
    add_span(joined, span);
  }
  if (!std::ranges::equal(joined, spans)) {
    throw Error("session log: its strengths are not in their shortest form");
  }
}

}  // namespace

SessionLog::SessionLog(std::int64_t vocabulary_size, const LogBase& base)
    : vocabulary_size_(vocabulary_size),
      bytes_per_token_(token_width(vocabulary_size)),
      base_(base),
      strengths_(std::make_shared<std::vector<StrengthSpan>>()) {
  check_base(base);
}

SessionLog SessionLog::from_packed(std::int64_t vocabulary_size, std::span<const std::byte> packed,
                                   std::span<const LogCall> calls,
                                   std::vector<StrengthSpan> strengths, const LogBase& base) {
  SessionLog log(vocabulary_size, base);
  const std::size_t held = packed.size() / log.bytes_per_token_;
  if (held * log.bytes_per_token_ != packed.size() || count_tokens(calls, held) != held) {
    throw Error("session log: the calls do not cover the " + std::to_string(packed.size()) +
                " bytes of tokens");
  }
  if (static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max() - base.position) < held) {
    throw Error("session log: its positions are too large");
  }
  log.packed_.append(packed);
  std::int64_t begin = log.start();
  for (const LogCall& call : calls) {
    log.calls_.push_back({call, begin});
    begin += call.tokens;
  }
  const std::size_t width = log.bytes_per_token_;
  const std::size_t unknown = find_unknown(packed.data(), width, held, vocabulary_size);
  if (unknown < held) {
    const auto position = log.start() + static_cast<std::int64_t>(unknown);
    throw Error("session log: token " + std::to_string(position) + " must be below " +
                std::to_string(vocabulary_size) + ", got " +
                std::to_string(log.tokens(position, position + 1).front()));
  }
  check_strengths(strengths, log.start(), log.end());
  log.put_strengths(std::move(strengths));
  return log;
}

// ---- growing -----------------------------------------------------------------------------------

void SessionLog::start_call(CallKind kind, std::span<const std::int64_t> tokens,
                            std::optional<std::uint64_t> seed) {
  if (tokens.empty()) throw Error("session log: a call must begin with at least one token");
  const std::int64_t begin = end();
  append(tokens);
  calls_.push_back({{kind, static_cast<std::int64_t>(tokens.size()), seed}, begin});
}

void SessionLog::extend_call(std::span<const std::int64_t> tokens) {
  if (calls_.empty()) throw Error("session log: there is no call to extend");
  append(tokens);
  Call last = calls_.back();
  last.call.tokens += static_cast<std::int64_t>(tokens.size());
  calls_.set_back(last);
}

void SessionLog::append(std::span<const std::int64_t> tokens) {
  for (const std::int64_t id : tokens) {
    if (id < 0 || id >= vocabulary_size_) {
      throw Error("session log: a token must be in [0, " + std::to_string(vocabulary_size_) +
                  "), got " + std::to_string(id));
    }
  }
  std::vector<std::byte> packed(tokens.size() * bytes_per_token_);
  const auto width = static_cast<std::int64_t>(bytes_per_token_);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    detail::store_token(tokens[i], width, packed.data() + i * bytes_per_token_);
  }
  packed_.append(packed);
}

// ---- edits -------------------------------------------------------------------------------------

void SessionLog::truncate(std::int64_t end) {
  check_span(end, this->end());
  if (end == this->end()) return;
  const std::size_t index = call_at(end);
  Call cut = calls_[index];
  calls_.truncate(index);
  cut.call.tokens = end - cut.begin;
  if (cut.call.tokens > 0) calls_.push_back(cut);
  packed_.truncate(byte_at(end));
  std::vector<StrengthSpan> spans;
  for (StrengthSpan span : *strengths_) {
    span.end = std::min(span.end, end);
    add_span(spans, span);
  }
  put_strengths(std::move(spans));
}

std::int64_t SessionLog::common_end(const SessionLog& other) const {
  if (vocabulary_size_ != other.vocabulary_size_ || base_ != other.base_) {
    throw Error("session_log: two logs that do not begin at the same place have nothing in common");
  }
  std::int64_t end = start();
  bool same = true;
  for (std::size_t i = 0; same && i < std::min(calls_.size(), other.calls_.size()); ++i) {
    const LogCall& mine = calls_[i].call;
    const LogCall& theirs = other.calls_[i].call;
    if (mine.kind != theirs.kind || mine.seed != theirs.seed) break;
    const std::int64_t shorter = std::min(mine.tokens, theirs.tokens);
    const auto left = tokens(end, end + shorter);
    const auto right = other.tokens(end, end + shorter);
    end += std::ranges::mismatch(left, right).in1 - left.begin();
    same = mine.tokens == theirs.tokens && left == right;
  }
  const auto each = [](const SessionLog& log, std::int64_t begin, std::int64_t end) {
    auto strengths = log.strengths(begin, end);
    if (strengths.empty()) strengths.assign(static_cast<std::size_t>(end - begin), 1.0F);
    return strengths;
  };
  const auto left = each(*this, start(), end);
  return start() + (std::ranges::mismatch(left, each(other, start(), end)).in1 - left.begin());
}

void SessionLog::append(const SessionLog& other, std::int64_t begin) {
  other.check_span(begin, other.end());
  for (std::size_t i = 0; i < other.calls_.size(); ++i) {
    const Call& call = other.calls_[i];
    const std::int64_t from = std::max(begin, call.begin);
    if (from >= call.end()) continue;
    const auto seed = from == call.begin ? call.call.seed : std::nullopt;
    start_call(call.call.kind, other.tokens(from, call.end()), seed);
    for (const StrengthSpan& span : other.strengths()) {
      const auto first = std::max(from, span.begin);
      const auto last = std::min(call.end(), span.end);
      if (first >= last) continue;
      const std::int64_t shift = end() - call.end();
      set_strength(first + shift, last + shift, span.strength);
    }
  }
}

void SessionLog::erase(std::int64_t begin, std::int64_t end) {
  check_span(begin, end);
  if (begin == end) return;
  const auto moved = [&](std::int64_t position) {
    return position <= begin ? position : std::max(begin, position - (end - begin));
  };
  const std::size_t first = call_at(begin);
  const std::vector<Call> rest = calls_.items(first, calls_.size());
  const std::vector<std::byte> kept = packed_.items(byte_at(end), packed_.size());
  calls_.truncate(first);
  for (Call call : rest) {
    call.call.tokens = moved(call.end()) - moved(call.begin);
    call.begin = moved(call.begin);
    if (call.call.tokens > 0) calls_.push_back(call);
  }
  packed_.truncate(byte_at(begin));
  packed_.append(kept);
  std::vector<StrengthSpan> spans;
  for (const StrengthSpan& span : *strengths_) {
    add_span(spans, {moved(span.begin), moved(span.end), span.strength});
  }
  put_strengths(std::move(spans));
}

std::int64_t SessionLog::set_strength(std::int64_t begin, std::int64_t end, float strength) {
  check_span(begin, end);
  check_strength(strength);
  std::int64_t changed = begin;
  while (changed < end && this->strength(changed) == strength) ++changed;
  std::vector<StrengthSpan> spans;
  for (const StrengthSpan& span : *strengths_) {
    add_span(spans, {span.begin, std::min(span.end, begin), span.strength});
  }
  add_span(spans, {begin, end, strength});
  for (const StrengthSpan& span : *strengths_) {
    add_span(spans, {std::max(span.begin, end), span.end, span.strength});
  }
  put_strengths(std::move(spans));
  return changed;
}

void SessionLog::commit() {
  base_ = {end(), read(), written(), generator()};
  packed_ = {};
  calls_ = {};
  put_strengths({});
}

void SessionLog::put_strengths(std::vector<StrengthSpan> spans) {
  strengths_ = std::make_shared<const std::vector<StrengthSpan>>(std::move(spans));
}

// ---- looking -----------------------------------------------------------------------------------

void SessionLog::check_span(std::int64_t begin, std::int64_t end) const {
  if (begin < start() || end < begin || end > this->end()) {
    throw Error("session log: the span " + span_text(begin, end) + " must lie within the log " +
                span_text(start(), this->end()));
  }
}

std::size_t SessionLog::byte_at(std::int64_t position) const {
  return static_cast<std::size_t>(position - start()) * bytes_per_token_;
}

std::size_t SessionLog::call_at(std::int64_t position) const {
  std::size_t low = 0;
  std::size_t high = calls_.size();
  while (high - low > 1) {
    const std::size_t middle = low + (high - low) / 2;
    (calls_[middle].begin <= position ? low : high) = middle;
  }
  return low;
}

std::vector<LogCall> SessionLog::calls() const {
  std::vector<LogCall> out;
  out.reserve(calls_.size());
  for (const Call& call : calls_.items(0, calls_.size())) out.push_back(call.call);
  return out;
}

std::vector<std::int64_t> SessionLog::tokens(std::int64_t begin, std::int64_t end) const {
  check_span(begin, end);
  const std::vector<std::byte> bytes = packed_.items(byte_at(begin), byte_at(end));
  std::vector<std::int64_t> out(static_cast<std::size_t>(end - begin));
  const auto width = static_cast<std::int64_t>(bytes_per_token_);
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = detail::load_token(bytes.data() + i * bytes_per_token_, width);
  }
  return out;
}

float SessionLog::strength(std::int64_t position) const {
  const auto after = std::ranges::upper_bound(*strengths_, position, {}, &StrengthSpan::begin);
  if (after == strengths_->begin()) return 1.0F;
  const StrengthSpan& span = *std::prev(after);
  return position < span.end ? span.strength : 1.0F;
}

std::vector<float> SessionLog::strengths(std::int64_t begin, std::int64_t end) const {
  check_span(begin, end);
  std::vector<float> out;
  auto span = std::ranges::upper_bound(*strengths_, begin, {}, &StrengthSpan::end);
  for (; span != strengths_->end() && span->begin < end; ++span) {
    out.resize(static_cast<std::size_t>(end - begin), 1.0F);
    std::fill(out.begin() + (std::max(span->begin, begin) - begin),
              out.begin() + (std::min(span->end, end) - begin), span->strength);
  }
  return out;
}

Generator SessionLog::generator() const {
  Generator generator = base_.generator;
  for (const LogCall& call : calls()) {
    if (call.kind != CallKind::kWritten) continue;
    if (call.seed) generator = {.seed = *call.seed};
    generator.draws += static_cast<std::uint64_t>(call.tokens);
  }
  return generator;
}

std::int64_t SessionLog::counted(CallKind kind) const {
  std::int64_t total = 0;
  for (const LogCall& call : calls()) total += call.kind == kind ? call.tokens : 0;
  return total;
}

std::int64_t SessionLog::read() const { return base_.read + counted(CallKind::kRead); }

std::int64_t SessionLog::written() const { return base_.written + counted(CallKind::kWritten); }

StrengthSpan SessionLog::run_at(const Call& call, std::int64_t position) const {
  const auto after = std::ranges::upper_bound(*strengths_, position, {}, &StrengthSpan::begin);
  auto first = std::prev(after);
  while (first != strengths_->begin() && std::prev(first)->end == first->begin) --first;
  auto last = std::prev(after);
  while (std::next(last) != strengths_->end() && std::next(last)->begin == last->end) ++last;
  return {std::max(first->begin, call.begin), std::min(last->end, call.end()), 0.0F};
}

LogStep SessionLog::step_at(std::int64_t begin, std::int64_t piece) const {
  const Call& call = calls_[call_at(begin)];
  const bool written = call.call.kind == CallKind::kWritten;
  if (written && strength(begin) == 1.0F) return {begin, begin + 1, true};
  const StrengthSpan run =
      written ? run_at(call, begin) : StrengthSpan{call.begin, call.end(), 0.0F};
  const std::int64_t left = piece - (begin - run.begin) % piece;
  return {begin, begin + std::min(left, run.end - begin), false};
}

bool SessionLog::is_boundary(std::int64_t position, std::int64_t piece) const {
  if (position < start() || position > end()) return false;
  if (position == end()) return true;
  const Call& call = calls_[call_at(position)];
  if (call.call.kind == CallKind::kRead) return (position - call.begin) % piece == 0;
  if (strength(position) == 1.0F) return true;
  return (position - run_at(call, position).begin) % piece == 0;
}

std::size_t SessionLog::bytes() const {
  return packed_.bytes() + calls_.bytes() + strengths_->size() * sizeof(StrengthSpan);
}

bool SessionLog::operator==(const SessionLog& other) const {
  return vocabulary_size_ == other.vocabulary_size_ && base_ == other.base_ &&
         packed_ == other.packed_ && calls_ == other.calls_ && *strengths_ == *other.strengths_;
}

}  // namespace fastweights
