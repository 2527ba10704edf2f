#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fastweights/session/session.hpp"
#include "guesses.hpp"
#include "journal.hpp"
#include "replay.hpp"

/// \file
/// The calls of a session, step by step: for `Session` itself, and for who runs the steps of many.

namespace fastweights::detail {

/// A call of `Session::write` that is under way. It works on copies: the session is as it was until
/// `finish`. The steps, in inference mode but for `ask`:
///
///     while (token = draw()) { Replay::write_each(model, {*token}); accept(); ask(); }
///     text = finish(session);
class Writing {
 public:
  /// Throws Error if an option is out of its range. `session` and `options` must outlive the call.
  Writing(const Session& session, const WriteOptions& options);

  /// The token that is to be read next, or none if the text is at its end.
  std::optional<WrittenToken> draw();
  /// Takes the token that was drawn into the text, after it was read.
  void accept();
  bool wants_to_ask() const { return static_cast<bool>(options_.on_token); }
  /// Calls `on_token` with the bytes of that token; what it throws is kept until `finish`.
  void ask();
  /// Whether there is no next token.
  bool is_over() const { return !more_ || std::ssize(written_) >= options_.max_tokens; }
  /// The session becomes one that has written the text. Throws what a step has kept.
  std::string finish(Session& session);

 private:
  std::span<const std::int64_t> guess(std::int64_t token);
  void stop_with(std::exception_ptr thrown);

  const WriteOptions& options_;
  Replay replay_;
  Generator generator_;
  Journal journal_;
  Guesses guesses_;
  std::int64_t begin_;
  std::vector<std::int64_t> written_;
  std::string text_;
  std::exception_ptr thrown_;
  bool more_ = true;
};

/// What only a session's own calls reach.
struct SessionSteps {
  /// Reads the next piece of a call of `Session::read`; in inference mode.
  static void read_piece(Session& session, std::string_view piece, bool first);
  /// Bytes of all tensors, of the exact store and of the log, those included that copies share.
  static std::int64_t bytes(const Session& session);
};

/// Throws Cancelled for a read that was stopped.
[[noreturn]] void throw_stopped(std::size_t done, std::size_t total);

}  // namespace fastweights::detail
