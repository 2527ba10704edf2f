#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fastweights/nn/state.hpp"
#include "fastweights/session/end_to_end.hpp"
#include "fastweights/session/exact_store.hpp"
#include "fastweights/session/generator.hpp"
#include "fastweights/session/log.hpp"
#include "fastweights/session/mark.hpp"
#include "fastweights/session/protection.hpp"
#include "fastweights/session/sampling.hpp"
#include "fastweights/session/write_policy.hpp"

namespace fastweights {

struct StateFile;

namespace nn {
class LanguageModelImpl;
}

namespace detail {

class Journal;
class Recollection;
struct SessionSteps;
class Writing;

/// What a session has learned end to end, and the tokens of the step to come; undefined tensors
/// where it does not.
struct EndToEndState {
  at::Tensor delta;      ///< ΔW of gate and up projection: [2 · feed_forward_width, width], fp32
  at::Tensor waiting;    ///< residual streams before the feed-forward [every, width], then zeros
  at::Tensor tokens;     ///< int64 [every]
  at::Tensor strengths;  ///< fp32 [every], on the CPU like the tokens
};

/// What recursive least squares keeps of what each layer's memory was asked to hold: the inverse of
/// ridge · I + Σ βᵢ k̂ᵢ k̂ᵢᵀ, fp64 [1, HV, K, K]. Empty under other rules.
using Covariances = std::vector<at::Tensor>;

/// A place in a text, and all that decides what comes next there. Nothing writes into the tensors
/// of a session between its calls, so copies share them.
struct Place {
  nn::LanguageModelState state;
  at::Tensor logits;                ///< of the next token: fp32 [vocabulary]
  std::int64_t limited_writes = 0;  ///< β that were limited to the stable range up to here
  std::shared_ptr<Recollection> recollection = {};  ///< null where there is no exact store
  std::int64_t capped_norms = 0;  ///< matrices that the write policy scaled down up to here
  EndToEndState end_to_end = {};
  Covariances covariances = {};
  std::int64_t refused_writes = 0;  ///< that a protection has refused up to here
};

}  // namespace detail

/// Called between pieces with the tokens done and in all; false stops the call, which then throws
/// Cancelled. What was read so far stays read; an edit of the log leaves no trace.
using Progress = std::function<bool(std::int64_t done, std::int64_t total)>;

/// Fixed for the life of a session.
struct SessionOptions {
  /// Tokens that a read processes at once, counted from the start of each call. It decides speed,
  /// the memory that a read needs, and rounding; so it belongs to the session.
  std::int64_t piece = 1024;
  /// Seed of the generator that `write` draws from until it is given another one.
  std::uint64_t seed = 0;
  /// Bytes of tensors that may be kept to make going back cheap, in 512 checkpoints at most; 0: an
  /// edit replays the whole log.
  std::int64_t journal_bytes = std::int64_t{64} << 20;
  /// An exact store behind window and fast weights, which recalls what was read at any distance;
  /// none: no store. It grows with the text, up to its own budgets.
  std::optional<ExactStoreOptions> store = {};
  /// What is done to its writes beyond what the model was trained to do.
  WritePolicy policy = {};
  /// Gradient steps on the last block's feed-forward, in a ΔW of the session's own; none: no steps.
  std::optional<EndToEndOptions> end_to_end = {};
  /// Keys of the memories in the blocks that writes leave alone; null: none. Such a session runs
  /// module by module.
  std::shared_ptr<const Protection> protection = {};
};

/// A place in a session's text: a mark, or a position.
class TextPoint {
 public:
  TextPoint(Mark mark) : mark_(mark) {}
  TextPoint(std::int64_t position) : position_(position) {}

 private:
  friend class Session;
  std::optional<Mark> mark_;
  std::int64_t position_ = 0;
};

/// What a session did and holds; see `Session::report`.
struct SessionReport {
  std::int64_t read = 0;              ///< tokens read since the session began
  std::int64_t written = 0;           ///< tokens written
  std::int64_t committed = 0;         ///< of both, those that commit() took out of the log
  std::int64_t checkpoints = 0;       ///< places that going back can start from
  std::int64_t checkpoint_bytes = 0;  ///< of their tensors; copies of a session share them
  std::int64_t log_bytes = 0;         ///< of tokens, calls and strengths; copies share them too
  std::int64_t marks = 0;             ///< that are valid
  /// β that feedback would have raised beyond 2 and that were limited, over all layers, heads and
  /// tokens of the session's present text.
  std::int64_t limited_writes = 0;
  /// Matrices that the write policy's caps scaled down, over all pieces and written tokens of the
  /// present text.
  std::int64_t capped_norms = 0;
  /// Writes that a protection refused, over all layers, heads and tokens of the present text.
  std::int64_t refused_writes = 0;
  std::int64_t store_tokens = 0;  ///< that the exact store was given; 0 without one
  std::int64_t store_bytes = 0;   ///< of what it keeps, whether copies share it or not
};

/// What `Session::write` writes, and when it stops.
struct WriteOptions {
  std::int64_t max_tokens = 256;
  /// See SamplingOptions; so are the next two.
  double temperature = 1.0;
  std::int64_t top_k = 0;
  double top_p = 1.0;
  /// Restarts the generator; without it, it goes on where it stands.
  std::optional<std::uint64_t> seed = {};
  /// Writing stops as soon as the text ends with one of these (none may be empty); the text that is
  /// returned, and that the session has learned, includes it.
  std::vector<std::string> stop = {};
  /// Called with the bytes of each token once it has been learned; false stops writing.
  std::function<bool(std::string_view)> on_token = {};
  /// Speculative decoding: at most so many tokens, in [0, 64], are guessed and read in one pass
  /// with the one before them. Those that turn out to be what is written are kept, the others leave
  /// no trace. Text and session are the same to the bit; only the time differs. Guesses are what
  /// followed the same words earlier in the session's text, so it pays where a text repeats itself.
  /// Without fused kernels, or under a write policy with a gate for surprise or caps, nothing is
  /// guessed.
  std::int64_t ahead = 0;
  /// Guesses in place of that look-up, from a small model, say. Gets the text since it was last
  /// asked (at first, the token that was written first) and how many tokens are wanted; returns
  /// what may follow. Not in a SessionPool.
  std::function<std::string(std::string_view, std::int64_t)> guess = {};
};

/// A running model that learns from what it reads and from what it writes.
///
/// A session owns fast weights, attention window and generator; the model is constant and may be
/// shared by any number of sessions on any number of threads. One session is used by one thread at
/// a time. A session is a log of what was read and written, and of how strongly it was learned:
/// everything else is a function of model and log, the same bits on one machine, build and number
/// of threads. `rollback`, `feedback`, `revoke` edit the log and replay it from the nearest
/// checkpoint; afterwards the session is, bit for bit, one that was driven that way from the start.
/// An edit that is cancelled or fails leaves the session as it was.
///
/// With an exact store its votes are mixed into every prediction, and it is part of all of this: of
/// edits, copies, scores and files.
///
/// Memory is constant but for the log, which takes a byte per token (with a vocabulary of 256) and
/// a few bytes per call, and for the exact store. If a call throws, the session is valid and holds
/// what was processed up to the last complete step. Copies are independent and share what neither
/// has changed: a copy costs what differs.
class Session {
 public:
  /// An empty session. Throws Error if the model is in training mode or its vocabulary is not that
  /// of bytes (256), or if `options.piece` < 1.
  explicit Session(std::shared_ptr<const nn::LanguageModelImpl> model,
                   const SessionOptions& options = {});

  /// Reads a text of any length, any bytes, and learns from it. Throws Error if the model's numbers
  /// are not finite any more after a piece; then that piece was not read.
  void read(std::string_view text, const Progress& progress = {});

  /// The same, and returns the bits that each byte cost before it was learned: −log2 p(byte).
  std::vector<float> read_and_score(std::string_view text, const Progress& progress = {});

  /// Bits per byte of a text from here on. A copy of the session learns as it reads, and is
  /// dropped: this session does not change. Throws Error if the text is empty.
  double score(std::string_view text, const Progress& progress = {}) const;

  /// The same for each byte.
  std::vector<float> token_bits(std::string_view text, const Progress& progress = {}) const;

  /// Writes on from here, learns what it writes, and returns its bytes (not always valid UTF-8).
  /// If `on_token` throws, the session holds what was written until then.
  std::string write(const WriteOptions& options = {});

  /// Marks this place: a name for the present position that moves along when what comes before it
  /// is revoked. Valid until `commit`, or a rollback to before it; then its use is an Error that
  /// says so, as is the use of another session's mark. Copies inherit marks; files keep them.
  Mark mark();

  /// Where a mark stands; throws Error if it is not valid.
  std::int64_t position(const Mark& mark) const { return marks_.position(mark); }

  /// The valid marks, in order of their positions.
  std::vector<Mark> marks() const;

  /// Goes back: afterwards the session is one that read and wrote nothing after `to`, which may lie
  /// inside a call, a piece or a write. Marks behind it are not valid any more. Throws Error if it
  /// lies before what was committed or beyond the end.
  void rollback(TextPoint to, const Progress& progress = {});

  /// Sets how strongly what followed `since` was learned: afterwards the session is one in which
  /// every β and η of these tokens was multiplied by `r` (limited to 2, the stable range; the
  /// report counts how often) and every g by min(r, 1). It sets, it does not compose: 1 gives the
  /// bits that there were. With 0 the text passed the attention window and left no write. Only
  /// under another strength than 1 are written tokens processed like read ones, in pieces. Throws
  /// Error unless 0 ≤ r ≤ 2.
  void feedback(TextPoint since, float r, const Progress& progress = {});

  /// The same for the tokens from `from` to before `to`.
  void feedback(TextPoint from, TextPoint to, float r, const Progress& progress = {});

  /// Feedback with a correction, in one call: what followed `since` gets the strength `r`, and
  /// `better` is read, and learned, in its place. What followed stays in the attention window, and
  /// `better` comes after it: feedback(since, r) and read(better), but if it fails neither has
  /// happened. To take the text out of the window too, roll back and read.
  void correct(TextPoint since, std::string_view better, float r = 0.0F,
               const Progress& progress = {});

  /// Feedback that fades with distance: an eligibility trace times a reward. The last token gets
  /// the strength 1 + r, one that lies `half_life` tokens further back 1 + r/2, and so on, in steps
  /// of 1/64; those that would get 1 keep the strength they have. Like `feedback` it sets. Throws
  /// Error unless −1 ≤ r ≤ 1 and `half_life` > 0.
  void reward(float r, double half_life = 64.0, const Progress& progress = {});

  /// Takes out the tokens from `from` to before `to`: afterwards the session is one that never read
  /// them, but did read what came after them, with the calls' other boundaries where they were.
  /// Later positions and marks move along; marks among the tokens stand where they began.
  void revoke(TextPoint from, TextPoint to, const Progress& progress = {});

  /// Goes on with what `other` read and wrote since the two were one: afterwards the session is one
  /// that did so itself, after all that it did. Marks are the session's own. Throws Error if the
  /// two run on different models, or if what one of them committed is not the beginning of both.
  void merge(const Session& other, const Progress& progress = {});

  /// Makes what happened so far final: tensors, position and generator stay, the log before this
  /// place is gone, and no mark is valid any more.
  void commit();

  /// A copy that goes its own way.
  Session fork() const { return *this; }

  SessionReport report() const;

  /// The session that has this log: replays all of it. Options but `seed` count, which is the
  /// log's. Throws Error if the log's beginning was committed, or its vocabulary is not the
  /// model's.
  static Session from_log(std::shared_ptr<const nn::LanguageModelImpl> model, const SessionLog& log,
                          const SessionOptions& options = {}, const Progress& progress = {});

  /// Logits of the next token, fp32 [vocabulary] on the CPU, a copy; all 0 in a fresh session,
  /// which so predicts its first byte uniformly. With an exact store: log p by model and store.
  at::Tensor logits() const;

  /// Name → tensor, copies of everything that decides the next token: `layers.N.memory.state`,
  /// `layers.N.memory.conv`, `layers.N.attention.key`, `layers.N.attention.value`, `position`,
  /// `generator` (int64 [2]: the bits of its seed, and its draws) and `logits`; with an exact store
  /// its tensors, and `store.hidden` and `store.logits`, what the model said at this place.
  nn::NamedTensors state() const;

  /// Tokens read and written so far, without those that were rolled back or revoked.
  std::int64_t position() const { return log_.end(); }

  /// What was read and written.
  const SessionLog& log() const { return log_; }

  /// The model that it runs on.
  const std::shared_ptr<const nn::LanguageModelImpl>& model() const { return model_; }

  const SessionOptions& options() const { return options_; }

  /// Whether `write` runs on the fused kernels: the model is on the CPU, in fp32 or bf16, and its
  /// modules are what its configuration says. Otherwise the modules themselves are called, with the
  /// same results up to rounding.
  bool fused() const;

  /// Saves the session in a file that only its owner can read, bound to the model. The file holds
  /// everything that was read, the marks and the checkpoints. Throws FileError; then whatever stood
  /// at `path` is untouched.
  void save(const std::filesystem::path& path) const;

  /// A session that goes on exactly like the one that was saved. Throws FileError if the file is
  /// missing, cut short, altered, malformed or of a newer version, StateMismatch if it belongs to
  /// another model.
  static Session load(const std::filesystem::path& path,
                      std::shared_ptr<const nn::LanguageModelImpl> model);

 private:
  friend struct detail::SessionSteps;
  friend class detail::Writing;

  /// Sees each piece that was read: its tokens, the logits before its first token [vocabulary] and
  /// those after each token [T, vocabulary].
  using AfterPiece = std::function<void(std::span<const std::int64_t> tokens,
                                        const at::Tensor& before, const at::Tensor& rows)>;

  void read_pieces(std::string_view text, const Progress& progress, const AfterPiece& after);
  void read_piece(std::span<const std::int64_t> tokens, bool first, const AfterPiece& after);
  void restore(const StateFile& file);
  std::int64_t resolve(const TextPoint& point, const char* name) const;
  void check_order(std::int64_t from, std::int64_t to) const;
  void edit(SessionLog log, MarkTable marks, std::int64_t unchanged, const Progress& progress);
  detail::Place base_place() const;
  detail::Journal& journal();

  std::shared_ptr<const nn::LanguageModelImpl> model_;
  SessionOptions options_;
  detail::Place place_;
  std::shared_ptr<const detail::Place> base_;  // where the log begins; null: a fresh session
  std::shared_ptr<detail::Journal> journal_;
  Generator generator_;
  SessionLog log_;
  MarkTable marks_;
};

}  // namespace fastweights
