#include "fastweights/session/log.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "fastweights/core/error.hpp"

namespace fastweights {
namespace {

constexpr std::int64_t kMaxVocabulary = std::int64_t{1} << 32;

std::size_t token_width(std::int64_t vocabulary_size) {
  if (vocabulary_size < 1 || vocabulary_size > kMaxVocabulary) {
    throw Error("session log: vocabulary_size must be in [1, 2^32], got " +
                std::to_string(vocabulary_size));
  }
  std::size_t width = 1;
  while ((std::int64_t{1} << (8 * width)) < vocabulary_size) ++width;
  return width;
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

}  // namespace

SessionLog::SessionLog(std::int64_t vocabulary_size)
    : vocabulary_size_(vocabulary_size), bytes_per_token_(token_width(vocabulary_size)) {}

SessionLog SessionLog::from_packed(std::int64_t vocabulary_size, std::span<const std::byte> packed,
                                   std::vector<LogCall> calls) {
  SessionLog log(vocabulary_size);
  const std::size_t held = packed.size() / log.bytes_per_token_;
  if (held * log.bytes_per_token_ != packed.size() || count_tokens(calls, held) != held) {
    throw Error("session log: the calls do not cover the " + std::to_string(packed.size()) +
                " bytes of tokens");
  }
  log.packed_.assign(packed.begin(), packed.end());
  log.calls_ = std::move(calls);
  for (std::size_t i = 0; i < held; ++i) {
    if (log.token(i) >= vocabulary_size) {
      throw Error("session log: token " + std::to_string(i) + " must be below " +
                  std::to_string(vocabulary_size) + ", got " + std::to_string(log.token(i)));
    }
  }
  return log;
}

void SessionLog::start_call(CallKind kind, std::span<const std::int64_t> tokens,
                            std::optional<std::uint64_t> seed) {
  if (tokens.empty()) throw Error("session log: a call must begin with at least one token");
  calls_.push_back({kind, static_cast<std::int64_t>(tokens.size()), seed});
  try {
    append(tokens);
  } catch (...) {
    calls_.pop_back();
    throw;
  }
}

void SessionLog::extend_call(std::span<const std::int64_t> tokens) {
  if (calls_.empty()) throw Error("session log: there is no call to extend");
  append(tokens);
  calls_.back().tokens += static_cast<std::int64_t>(tokens.size());
}

std::int64_t SessionLog::size() const {
  return static_cast<std::int64_t>(packed_.size() / bytes_per_token_);
}

std::vector<std::int64_t> SessionLog::tokens(std::int64_t begin, std::int64_t end) const {
  if (begin < 0 || end < begin || end > size()) {
    throw Error("session log: the span [" + std::to_string(begin) + ", " + std::to_string(end) +
                ") must lie within the " + std::to_string(size()) + " tokens of the log");
  }
  std::vector<std::int64_t> out(static_cast<std::size_t>(end - begin));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = token(static_cast<std::size_t>(begin) + i);
  return out;
}

void SessionLog::append(std::span<const std::int64_t> tokens) {
  for (const std::int64_t id : tokens) {
    if (id < 0 || id >= vocabulary_size_) {
      throw Error("session log: a token must be in [0, " + std::to_string(vocabulary_size_) +
                  "), got " + std::to_string(id));
    }
  }
  const std::size_t needed = packed_.size() + tokens.size() * bytes_per_token_;
  if (needed > packed_.capacity()) packed_.reserve(std::max(needed, packed_.capacity() * 3 / 2));
  for (const std::int64_t id : tokens) {
    for (std::size_t b = 0; b < bytes_per_token_; ++b) {
      packed_.push_back(static_cast<std::byte>((id >> (8 * b)) & 0xFF));
    }
  }
}

std::int64_t SessionLog::token(std::size_t index) const {
  std::int64_t id = 0;
  for (std::size_t b = 0; b < bytes_per_token_; ++b) {
    id |= std::to_integer<std::int64_t>(packed_[index * bytes_per_token_ + b]) << (8 * b);
  }
  return id;
}

}  // namespace fastweights
