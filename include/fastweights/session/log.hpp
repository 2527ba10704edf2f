#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace fastweights {

/// How the tokens of a call came into a session; a replay processes them the same way.
enum class CallKind : std::uint8_t {
  kRead = 0,     ///< given, processed in pieces of fixed size counted from the call's start
  kWritten = 1,  ///< sampled, processed one by one
};

/// One call of a session: the span of tokens that it added.
struct LogCall {
  CallKind kind = CallKind::kRead;
  std::int64_t tokens = 0;
  /// The seed that a written call began with, where it was given one.
  std::optional<std::uint64_t> seed;

  bool operator==(const LogCall&) const = default;
};

/// What a session has read and written: token ids and the boundaries of its calls.
///
/// It is a session's truth: its tensors, position and generator are functions of model and log. A
/// token takes 1 to 4 bytes, as few as the vocabulary allows. No LibTorch.
class SessionLog {
 public:
  /// An empty log of tokens in [0, vocabulary_size); throws Error unless 1 ≤ vocabulary_size ≤
  /// 2^32.
  explicit SessionLog(std::int64_t vocabulary_size);

  /// A log from its stored form; throws Error if the parts do not agree: the calls must cover the
  /// tokens exactly, none of them empty, each token within the vocabulary, seeds on written calls.
  static SessionLog from_packed(std::int64_t vocabulary_size, std::span<const std::byte> packed,
                                std::vector<LogCall> calls);

  /// Begins a call with its first tokens (at least one); throws Error if one is out of range.
  void start_call(CallKind kind, std::span<const std::int64_t> tokens,
                  std::optional<std::uint64_t> seed = {});

  /// Adds tokens to the last call, of which there must be one.
  void extend_call(std::span<const std::int64_t> tokens);

  std::int64_t vocabulary_size() const { return vocabulary_size_; }
  /// Tokens in the log.
  std::int64_t size() const;
  std::span<const LogCall> calls() const { return calls_; }
  /// The tokens [begin, end); throws Error unless 0 ≤ begin ≤ end ≤ size().
  std::vector<std::int64_t> tokens(std::int64_t begin, std::int64_t end) const;

  /// The stored form of the tokens: bytes_per_token() bytes each, little-endian.
  std::span<const std::byte> packed() const { return packed_; }
  std::size_t bytes_per_token() const { return bytes_per_token_; }

  bool operator==(const SessionLog&) const = default;

 private:
  void append(std::span<const std::int64_t> tokens);
  std::int64_t token(std::size_t index) const;

  std::int64_t vocabulary_size_;
  std::size_t bytes_per_token_;
  std::vector<std::byte> packed_;
  std::vector<LogCall> calls_;
};

}  // namespace fastweights
