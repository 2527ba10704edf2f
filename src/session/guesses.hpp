#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "fastweights/session/log.hpp"
#include "fastweights/session/longest_match.hpp"
#include "fastweights/session/session.hpp"

namespace fastweights::detail {

/// What a call of `Session::write` guesses that it is going to write: what the caller's function
/// says, or else what followed the last tokens where they stood before in the session's text.
/// How many it guesses follows how many came true.
class Guesses {
 public:
  /// `options` must outlive it.
  Guesses(const WriteOptions& options, const SessionLog& log);

  /// The text goes on by a token; `foreseen` if it had been guessed.
  void append(std::int64_t token, bool foreseen);

  /// At most `most` guesses at what comes next. Throws what the caller's function throws.
  std::span<const std::int64_t> next(std::int64_t most);

 private:
  void look_up(std::int64_t most);
  void ask(std::int64_t most);

  const WriteOptions& options_;
  LongestMatch text_;
  std::int64_t wanted_;
  std::int64_t came_true_ = 0;  // of the last guesses
  std::string unsaid_;          // what the caller's function has not been told yet
  std::vector<std::int64_t> guesses_;
};

}  // namespace fastweights::detail
