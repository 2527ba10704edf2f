#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastweights/session/session.hpp"

namespace fastweights {

/// Fixed for the life of a pool.
struct SessionPoolOptions {
  /// Bytes that sessions may hold in memory: their tensors, checkpoints and logs. When there would
  /// be more, sessions without a call go to disk, the one that was used longest ago first.
  std::int64_t memory_bytes = std::int64_t{1} << 30;
  /// Where they go: the pool makes a folder of its own in it, which only the owner can read, and
  /// removes it at its end. Made if it is missing, with mode 0700. Empty: nothing goes to disk.
  std::filesystem::path folder = {};
  /// Options of the sessions that `create` makes.
  SessionOptions session = {};
  /// Sessions whose next tokens are decoded together.
  std::int64_t most_per_batch = 64;
  /// Called several times a second by each thread whose read or write is under way; what it throws
  /// ends that call at the next boundary, and is thrown there.
  std::function<void()> poll = {};
};

/// What a pool holds and did; see `SessionPool::report`.
struct SessionPoolReport {
  std::int64_t resident = 0;        ///< sessions in memory
  std::int64_t on_disk = 0;         ///< sessions in the pool's folder
  std::int64_t resident_bytes = 0;  ///< of those in memory, each as of the end of its last call
  std::int64_t batches = 0;         ///< decoding steps
  std::int64_t tokens_written = 0;  ///< by all of them
  std::int64_t pieces_read = 0;
  std::int64_t saves = 0;  ///< sessions that went to disk
  std::int64_t loads = 0;  ///< and that came back

  /// Sessions per decoding step; 0 before the first.
  double mean_batch() const {
    return batches == 0 ? 0.0 : static_cast<double>(tokens_written) / static_cast<double>(batches);
  }
};

/// Many sessions on one model, called from any threads. Sessions that write at the same time are
/// decoded together, in one pass over the weights for all; pieces of reads come in between, so that
/// neither starves the other. A session that is not used may be on disk, and comes back with its
/// next call.
///
/// A session in a pool is, bit for bit, a lone Session that was driven by the same calls, whoever
/// else is in the pool and wherever it was in between, with the number of threads that the thread
/// that made the pool had set. Calls on one session are served in the order in which they came,
/// calls on different ones at the same time. An exception reaches its own caller alone.
///
/// Callbacks (`on_token`, `progress`, `poll`, the work of `use`) run on the thread of the call that
/// they belong to. They must not call the pool: that is an Error.
///
/// Every call throws Error if there is no session with that id. A call whose session is not in
/// memory, or is new, may need room: it throws FileError if another session could not be saved, or
/// its own not be loaded, and Error where the pool has no folder. Nothing is lost then, and nothing
/// has changed. If others' calls hold all the memory it waits; one session always has room. What
/// calls under way add counts when they end, so that the limit can be passed by that much.
class SessionPool {
 public:
  /// Throws Error as Session does, and if a limit is out of range; FileError if the folder cannot
  /// be made.
  explicit SessionPool(std::shared_ptr<const nn::LanguageModelImpl> model,
                       const SessionPoolOptions& options = {});

  /// Drops all sessions and their files. Calls under way, and those that wait, end with Cancelled
  /// at the next token or piece; the pool waits for them, and for work in `use` to end by itself.
  ~SessionPool();
  SessionPool(const SessionPool&) = delete;
  SessionPool& operator=(const SessionPool&) = delete;

  /// Makes a session that has seen nothing, with a seed of its own or that of the options. An id is
  /// any 1 to 80 bytes; throws Error if another session has it.
  void create(const std::string& id, std::optional<std::uint64_t> seed = {});
  /// Takes in a session. Throws Error if it runs on another model, or if the id is taken.
  void add(const std::string& id, Session session);
  /// Takes in the session of a state file; see `Session::load`.
  void load(const std::string& id, const std::filesystem::path& path);
  /// Drops a session, after the calls on it that came before. Those that wait for it then throw.
  void close(const std::string& id);

  /// Whether there is a session with that id.
  bool contains(const std::string& id) const;
  /// The ids of all sessions, in order.
  std::vector<std::string> ids() const;

  /// `Session::read`.
  void read(const std::string& id, std::string_view text, const Progress& progress = {});
  /// `Session::write`. One that is stopped by `poll` or by the pool's end has written the tokens
  /// until then, and the session has learned them.
  std::string write(const std::string& id, const WriteOptions& options = {});
  /// `Session::save`.
  void save(const std::string& id, const std::filesystem::path& path);

  /// Runs `work(session)`, a callable on Session&, on the calling thread, and returns what it
  /// returns: everything else that a session does. A copy that it makes is independent of the pool.
  template <class Work>
  auto use(const std::string& id, Work&& work) -> std::invoke_result_t<Work, Session&> {
    using Result = std::invoke_result_t<Work, Session&>;
    if constexpr (std::is_void_v<Result>) {
      run(id, [&](Session& session) { work(session); });
    } else {
      std::optional<Result> result;
      run(id, [&](Session& session) { result.emplace(work(session)); });
      return std::move(*result);
    }
  }

  /// What the pool holds and did.
  SessionPoolReport report() const;

  /// The model that all sessions run on.
  const std::shared_ptr<const nn::LanguageModelImpl>& model() const;
  const SessionPoolOptions& options() const;

 private:
  class Impl;

  void run(const std::string& id, const std::function<void(Session&)>& work);

  std::unique_ptr<Impl> impl_;
};

}  // namespace fastweights
