#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "fastweights/session/log.hpp"
#include "fastweights/session/session.hpp"

namespace fastweights::detail {

/// Where the last few tokens of a text stood before in it: the last such place, or the one that
/// goes on from the place found before. The exact store's LongestMatch finds the best of many
/// places and can be copied; a guess is dropped with the call, and the last place will do for it.
class TextLookup {
 public:
  TextLookup();

  void append(std::int64_t token);

  /// At most `most` tokens that followed there.
  std::vector<std::int64_t> following(std::int64_t most) const;

 private:
  bool agrees(std::int64_t position) const;
  std::size_t bucket() const;

  std::vector<std::int64_t> text_;
  std::vector<std::int64_t> last_;  // hash of some tokens → where the last such ones end, or 0
  std::int64_t found_ = 0;          // or 0
};

/// What a call of `Session::write` guesses that it is going to write: what the caller's function
/// says, or else what followed the last tokens where they stood before in the session's text.
/// How many it guesses follows how many came true: a pass that reads ahead costs more than one that
/// does not. After guesses of which none came true it waits, each time twice as long.
class Guesses {
 public:
  /// `options` must outlive it.
  Guesses(const WriteOptions& options, const SessionLog& log);

  /// The text goes on by a token; `foreseen` if it had been guessed.
  void append(std::int64_t token, bool foreseen);

  /// At most `most` guesses at what comes next. Throws what the caller's function throws.
  std::span<const std::int64_t> next(std::int64_t most);

 private:
  void learn();
  void ask(std::int64_t most);

  const WriteOptions& options_;
  TextLookup text_;
  std::int64_t wanted_;
  std::int64_t came_true_ = 0;  // of the last guesses
  std::int64_t pause_ = 0;      // passes without guesses after the next miss
  std::int64_t waiting_ = 0;    // of them yet to come
  std::string unsaid_;          // what the caller's function has not been told yet
  std::vector<std::int64_t> guesses_;
};

}  // namespace fastweights::detail
