#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "fastweights/session/session.hpp"
#include "replay.hpp"

namespace fastweights::detail {

/// Runs the reads and writes of many sessions of one model on a thread of its own: the next tokens
/// of all that write together, and between these steps the pieces of those that read, one at a
/// time. After a piece, the writers have the thread for as long as the piece took.
///
/// Callers wait; callbacks run on their threads. A caller that is being asked is left out of the
/// steps until it has answered, but for a moment's waiting, so that those who ask stay together.
class Scheduler {
 public:
  struct Counts {
    std::int64_t batches = 0;
    std::int64_t tokens = 0;
    std::int64_t pieces = 0;
  };

  /// It computes with as many threads as the calling thread has set.
  /// @param poll called now and then by waiting callers; may be empty
  Scheduler(std::shared_ptr<const nn::LanguageModelImpl> model, std::int64_t most_per_batch,
            std::function<void()> poll);
  /// No call may be under way.
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// `Session::read` and `Session::write`, of a session that no other call uses.
  void read(Session& session, std::string_view text, const Progress& progress);
  std::string write(Session& session, const WriteOptions& options);

  /// Calls under way end with Cancelled at their next boundary, as do all later ones.
  void stop();
  Counts counts() const;

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;
  struct Job;
  using Jobs = std::vector<Job*>;

  std::exception_ptr run(Job& job, Jobs& jobs, const std::function<bool()>& ask);
  void poll(Job& job, Lock& lock, std::exception_ptr& thrown);
  void loop();
  bool anyone_waits() const;
  void retire();
  Jobs take_batch();
  void await_company(Lock& lock);
  void write_tokens(Lock& lock);
  void read_piece(Lock& lock);
  void accept(const std::vector<WrittenToken>& tokens, const Jobs& jobs);
  template <class Step>
  static void guarded(Job& job, Step step);
  static bool is_ready(const Job* job);
  static void end(Job& job);
  static void ask(Job& job);

  std::shared_ptr<const nn::LanguageModelImpl> model_;
  std::size_t most_per_batch_;
  std::function<void()> poll_;
  int threads_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;  // of the thread
  Jobs readers_;                  // both in the order in which their turns come
  Jobs writers_;
  Clock::duration owed_{0};       // to the writers, since the last piece
  Clock::duration last_step_{0};  // how long it took
  Clock::time_point last_end_{};  // when it ended
  Counts counts_;
  bool stopping_ = false;
  bool ending_ = false;
  std::thread thread_;  // the last member: it uses the others
};

}  // namespace fastweights::detail
