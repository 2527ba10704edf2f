#pragma once

#include <cstdint>
#include <functional>
#include <thread>

#include "fastweights/core/executor.hpp"

namespace fastweights::test {

/// Every second task on a thread of its own.
inline core::Executor two_threads() {
  return {[](std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
            std::thread other([&] {
              for (std::int64_t task = 1; task < tasks; task += 2) body(task);
            });
            for (std::int64_t task = 0; task < tasks; task += 2) body(task);
            other.join();
          },
          2};
}

}  // namespace fastweights::test
