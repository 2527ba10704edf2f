#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include "executors.hpp"
#include "fastweights/core/team.hpp"

using fastweights::core::Executor;
using fastweights::core::Team;

namespace {

/// Every task on a thread of its own.
Executor many_threads(std::int64_t threads) {
  return {[](std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
            std::vector<std::thread> others;
            for (std::int64_t task = 0; task < tasks; ++task) others.emplace_back(body, task);
            for (auto& other : others) other.join();
          },
          threads};
}

/// Promises four threads and runs everything on one.
Executor one_thread_for_four() {
  auto executor = fastweights::core::serial_executor();
  executor.threads = 4;
  return executor;
}

/// Loops of every length up to 40, each reading what the one before has written.
std::vector<std::int64_t> run_loops(const Executor& executor) {
  std::vector<std::int64_t> values(40, 1);
  Team::run(executor, [&](Team& team) {
    for (std::int64_t tasks = 0; tasks <= 40; ++tasks) {
      for (int again = 0; again < 50; ++again) {
        const std::int64_t before =
            std::accumulate(values.begin(), values.end(), std::int64_t{0}) % 1000;
        team.loop(tasks, [&](std::int64_t task) {
          auto& value = values[static_cast<std::size_t>(task)];
          value = (value * 7 + before + task) % 10007;
        });
      }
    }
  });
  return values;
}

}  // namespace

TEST_CASE("a team runs every task once, loop after loop, on any executor", "[team]") {
  const auto expected = run_loops(fastweights::core::serial_executor());
  CHECK(run_loops(fastweights::test::two_threads()) == expected);
  CHECK(run_loops(many_threads(2)) == expected);
  CHECK(run_loops(many_threads(5)) == expected);
  CHECK(run_loops(one_thread_for_four()) == expected);
}

TEST_CASE("a team's loop uses the helpers", "[team]") {
  std::atomic<int> arrived{0};
  Team::run(many_threads(2), [&](Team& team) {
    // Each of the two tasks waits for the other: one thread alone would never end.
    team.loop(2, [&](std::int64_t) {
      ++arrived;
      while (arrived < 2) std::this_thread::yield();
    });
  });
  CHECK(arrived == 2);
}
