#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "fastweights/session/generator.hpp"
#include "fastweights/session/shared_sequence.hpp"

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

/// Tokens [begin, end) that are learned with a strength other than 1.
struct StrengthSpan {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  float strength = 1.0F;  ///< in [0, 2]

  bool operator==(const StrengthSpan&) const = default;
};

/// What came before the first token of a log: that of a fresh session, or of one that committed.
struct LogBase {
  std::int64_t position = 0;  ///< of the log's first token
  std::int64_t read = 0;      ///< tokens read before it
  std::int64_t written = 0;   ///< tokens written before it
  Generator generator;        ///< as it stood there

  bool operator==(const LogBase&) const = default;
};

/// What the model is called on at once.
struct LogStep {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  bool written = false;  ///< one token, on the kernels for writing

  bool operator==(const LogStep&) const = default;
};

/// What a session has read and written, and how strongly it learned it: token ids, the boundaries
/// of its calls, and the strengths that feedback gave.
///
/// It is a session's truth: its tensors, position and generator are functions of model and log. A
/// token takes 1 to 4 bytes, as few as the vocabulary allows. Copies share what they have in
/// common: they cost what differs. Positions count from the session's very first token. No
/// LibTorch.
///
/// A log says how it is processed (`step_at`). A read call goes in pieces of `piece` tokens counted
/// from the call's start, whatever their strengths. A written call goes token by token where the
/// strength is 1; a run of tokens with other strengths goes in pieces counted from the run's start.
class SessionLog {
 public:
  /// An empty log of tokens in [0, vocabulary_size); throws Error unless 1 ≤ vocabulary_size ≤
  /// 2^32, and if the counts of `base` do not agree.
  explicit SessionLog(std::int64_t vocabulary_size, const LogBase& base = {});

  /// A log from its stored form; throws Error if the parts do not agree: the calls must cover the
  /// tokens exactly, none of them empty, each token within the vocabulary, seeds on written calls,
  /// strengths as `strengths()` gives them.
  static SessionLog from_packed(std::int64_t vocabulary_size, std::span<const std::byte> packed,
                                std::span<const LogCall> calls,
                                std::vector<StrengthSpan> strengths = {}, const LogBase& base = {});

  /// Begins a call with its first tokens (at least one); throws Error if one is out of range.
  void start_call(CallKind kind, std::span<const std::int64_t> tokens,
                  std::optional<std::uint64_t> seed = {});

  /// Adds tokens to the last call, of which there must be one.
  void extend_call(std::span<const std::int64_t> tokens);

  /// Drops the tokens from `end` on; a call may be cut inside.
  void truncate(std::int64_t end);

  /// Takes the tokens [begin, end) out of their calls. A call that becomes empty vanishes, the
  /// others keep their boundaries; what came after moves along with its strengths.
  void erase(std::int64_t begin, std::int64_t end);

  /// Sets the strength, in [0, 2], of the tokens [begin, end). Returns the first of them whose
  /// strength was another one; `end` if there is none.
  std::int64_t set_strength(std::int64_t begin, std::int64_t end, float strength);

  /// Where two logs part: they have the same tokens in the same calls with the same strengths
  /// before it. Throws Error if they do not begin at the same place or have other vocabularies.
  std::int64_t common_end(const SessionLog& other) const;

  /// Appends what `other` has from `begin` on, in calls of their own.
  void append(const SessionLog& other, std::int64_t begin);

  /// Forgets all tokens and calls; positions and generator go on.
  void commit();

  std::int64_t vocabulary_size() const { return vocabulary_size_; }
  const LogBase& base() const { return base_; }
  /// Position of the first token that the log holds.
  std::int64_t start() const { return base_.position; }
  /// Position of the next token.
  std::int64_t end() const { return start() + size(); }
  /// Tokens in the log.
  std::int64_t size() const { return static_cast<std::int64_t>(packed_.size() / bytes_per_token_); }
  std::vector<LogCall> calls() const;
  std::size_t call_count() const { return calls_.size(); }
  /// The strengths other than 1, in order; neighbours differ or do not touch.
  std::span<const StrengthSpan> strengths() const { return *strengths_; }

  /// The tokens [begin, end); throws Error unless start() ≤ begin ≤ end ≤ end().
  std::vector<std::int64_t> tokens(std::int64_t begin, std::int64_t end) const;
  /// The strength of each of the tokens [begin, end); nothing if all are 1.
  std::vector<float> strengths(std::int64_t begin, std::int64_t end) const;

  /// The generator after the log: each written token drew once.
  Generator generator() const;
  /// Tokens read and written since the session began; those that were revoked or rolled back do
  /// not count.
  std::int64_t read() const;
  std::int64_t written() const;

  /// The step that begins at `begin`, which must be a boundary before the end.
  LogStep step_at(std::int64_t begin, std::int64_t piece) const;
  /// Whether a step begins or ends at `position`.
  bool is_boundary(std::int64_t position, std::int64_t piece) const;

  /// The stored form of the tokens: bytes_per_token() bytes each, little-endian.
  std::vector<std::byte> packed() const { return packed_.items(0, packed_.size()); }
  std::size_t bytes_per_token() const { return bytes_per_token_; }
  /// Bytes of all that the log holds, whether copies share it or not.
  std::size_t bytes() const;

  bool operator==(const SessionLog& other) const;

 private:
  struct Call {
    LogCall call;
    std::int64_t begin = 0;
    std::int64_t end() const { return begin + call.tokens; }
    bool operator==(const Call&) const = default;
  };

  void append(std::span<const std::int64_t> tokens);
  void check_span(std::int64_t begin, std::int64_t end) const;
  std::size_t call_at(std::int64_t position) const;
  std::size_t byte_at(std::int64_t position) const;
  std::int64_t counted(CallKind kind) const;
  /// Where, in the written call, the run of strengths other than 1 around `position` lies.
  StrengthSpan run_at(const Call& call, std::int64_t position) const;
  float strength(std::int64_t position) const;
  void put_strengths(std::vector<StrengthSpan> spans);

  std::int64_t vocabulary_size_;
  std::size_t bytes_per_token_;
  LogBase base_;
  detail::SharedSequence<std::byte> packed_;
  detail::SharedSequence<Call> calls_;
  std::shared_ptr<const std::vector<StrengthSpan>> strengths_;
};

}  // namespace fastweights
