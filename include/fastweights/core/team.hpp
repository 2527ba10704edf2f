#pragma once

#include <hwy/cache_control.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

#include "fastweights/core/executor.hpp"

namespace fastweights::core {

/// Threads that run many short parallel loops one after another in one call of an executor: a loop
/// costs a fraction of a microsecond, where a call of the executor costs several. One thread leads:
/// it starts each loop and takes part in it; the others help. A helper that comes late, or never,
/// only means that others do its work: whatever the executor does, nothing waits for a thread that
/// has not started.
class Team {
 public:
  /// Calls `lead(team)` on one of the executor's threads, with the others as helpers.
  template <class Lead>
  static void run(const Executor& executor, const Lead& lead) {
    Team team;
    executor.run(executor.threads, [&](std::int64_t) {
      if (team.has_leader_.exchange(true)) return team.help();
      const Finish finish{team};
      lead(team);
    });
  }

  /// Runs `body(0) … body(tasks − 1)`, tasks < 2^20, and returns when all are done. The leader
  /// calls it, one loop at a time. `body` must not throw.
  template <class Body>
  void loop(std::int64_t tasks, const Body& body) {
    if (tasks == 0) return;
    const auto count = static_cast<std::uint64_t>(tasks);
    body_ = &body;
    call_ = [](const void* self, std::int64_t task) { (*static_cast<const Body*>(self))(task); };
    done_.store(0, std::memory_order_relaxed);
    number_ = (number_ + 1) & kNumberMask;
    ticket_.store(number_ << kNumberShift | count << kBits, std::memory_order_release);
    while (take()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) wait(spins);
  }

 private:
  static constexpr int kBits = 20;
  static constexpr int kNumberShift = 2 * kBits;
  static constexpr std::uint64_t kMask = (std::uint64_t{1} << kBits) - 1;
  static constexpr std::uint64_t kNumberMask = (std::uint64_t{1} << (64 - kNumberShift)) - 1;
  static constexpr int kSpins = 256;

  struct Finish {
    Team& team;
    ~Finish() { team.finished_.store(true, std::memory_order_release); }
  };

  /// Takes one task of the current loop and does it; false if none is left. Who has taken a task
  /// keeps the loop from ending, so `body_` and `call_` are those of its own loop.
  bool take() {
    auto ticket = ticket_.load(std::memory_order_acquire);
    do {
      if ((ticket & kMask) >= (ticket >> kBits & kMask)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
    call_(body_, static_cast<std::int64_t>(ticket & kMask));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void help() {
    for (int spins = 0; !finished_.load(std::memory_order_acquire); ++spins) {
      if (take()) {
        spins = 0;
      } else {
        wait(spins);
      }
    }
  }

  static void wait(int spins) { spins < kSpins ? hwy::Pause() : std::this_thread::yield(); }

  std::atomic<bool> has_leader_{false};
  std::atomic<bool> finished_{false};
  /// The loop's number, its tasks and the next one of them: taking one compares all three.
  alignas(64) std::atomic<std::uint64_t> ticket_{0};
  alignas(64) std::atomic<std::uint64_t> done_{0};
  std::uint64_t number_ = 0;
  const void* body_ = nullptr;
  void (*call_)(const void*, std::int64_t) = nullptr;
};

}  // namespace fastweights::core
