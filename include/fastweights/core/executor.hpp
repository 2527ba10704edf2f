#pragma once

#include <cstdint>
#include <functional>

namespace fastweights::core {

/// Runs `body(0) … body(tasks - 1)`, in any order and on any threads, and returns when all are
/// done. `threads` tells the kernels how finely to cut the work; results never depend on it.
struct Executor {
  std::function<void(std::int64_t tasks, const std::function<void(std::int64_t)>& body)> run;
  std::int64_t threads = 1;
};

/// The executor that uses the calling thread alone.
inline Executor serial_executor() {
  return {[](std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
            for (std::int64_t task = 0; task < tasks; ++task) body(task);
          },
          1};
}

}  // namespace fastweights::core
