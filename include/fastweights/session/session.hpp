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
#include "fastweights/session/generator.hpp"
#include "fastweights/session/log.hpp"
#include "fastweights/session/sampling.hpp"

namespace fastweights {

struct StateFile;

namespace nn {
class LanguageModelImpl;
}

namespace detail {

class Decoder;

/// A place in a text, and all that decides what comes next there. Nothing writes into the tensors
/// of a session between its calls, so copies share them.
struct Place {
  nn::LanguageModelState state;
  at::Tensor logits;  ///< of the next token: fp32 [vocabulary]
};

}  // namespace detail

/// Called between pieces with the tokens done and in all; false stops the call, which then throws
/// Cancelled. What was done so far stays done.
using Progress = std::function<bool(std::int64_t done, std::int64_t total)>;

/// Fixed for the life of a session.
struct SessionOptions {
  /// Tokens that a read processes at once, counted from the start of each call. It decides speed,
  /// the memory that a read needs, and rounding; so it belongs to the session.
  std::int64_t piece = 1024;
  /// Seed of the generator that `write` draws from until it is given another one.
  std::uint64_t seed = 0;
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
};

/// A running model that learns from what it reads and from what it writes.
///
/// A session owns fast weights, attention window and generator; the model is constant and may be
/// shared by any number of sessions on any number of threads. One session is used by one thread at
/// a time. A session is a log of what was read and written: everything else is a function of model
/// and log, the same bits on one machine, build and number of threads.
///
/// Memory is constant but for the log, which takes a byte per token (with a vocabulary of 256) and
/// a few bytes per call. If a call throws, the session is valid and holds what was processed up to
/// the last complete step. Copies are independent and share what neither has changed.
class Session {
 public:
  /// An empty session. Throws Error if the model is in training mode or its vocabulary is not that
  /// of bytes (256), or if `options.piece` < 1.
  explicit Session(std::shared_ptr<const nn::LanguageModelImpl> model,
                   const SessionOptions& options = {});

  /// Reads a text of any length, any bytes, and learns from it.
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

  /// Logits of the next token, fp32 [vocabulary] on the CPU, a copy; all 0 in a fresh session,
  /// which so predicts its first byte uniformly.
  at::Tensor logits() const;

  /// Name → tensor, copies of everything that decides the next token: `layers.N.memory.state`,
  /// `layers.N.memory.conv`, `layers.N.attention.key`, `layers.N.attention.value`, `position`,
  /// `generator` (int64 [2]: the bits of its seed, and its draws) and `logits`.
  nn::NamedTensors state() const;

  /// Tokens read and written so far.
  std::int64_t position() const { return log_.size(); }

  /// What was read and written.
  const SessionLog& log() const { return log_; }

  /// Whether `write` runs on the fused kernels: the model is on the CPU, in fp32 or bf16, and its
  /// modules are what its configuration says. Otherwise the modules themselves are called, with the
  /// same results up to rounding.
  bool fused() const { return decoder_ != nullptr; }

  /// Saves the session in a file that only its owner can read, bound to the model. The file holds
  /// everything that was read. Throws FileError; then whatever stood at `path` is untouched.
  void save(const std::filesystem::path& path) const;

  /// A session that goes on exactly like the one that was saved. Throws FileError if the file is
  /// missing, cut short, altered, malformed or of a newer version, StateMismatch if it belongs to
  /// another model.
  static Session load(const std::filesystem::path& path,
                      std::shared_ptr<const nn::LanguageModelImpl> model);

 private:
  /// Sees each piece that was read: its tokens, the logits before its first token [vocabulary] and
  /// those after each token [T, vocabulary].
  using AfterPiece = std::function<void(std::span<const std::int64_t> tokens,
                                        const at::Tensor& before, const at::Tensor& rows)>;

  void read_pieces(std::string_view text, const Progress& progress, const AfterPiece& after);
  nn::NamedTensors place_tensors() const;
  void restore(const StateFile& file);

  std::shared_ptr<const nn::LanguageModelImpl> model_;
  std::shared_ptr<const detail::Decoder> decoder_;  // null where the modules are called
  SessionOptions options_;
  detail::Place place_;
  Generator generator_;
  SessionLog log_;
};

}  // namespace fastweights
