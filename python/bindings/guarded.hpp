#pragma once

#include <pybind11/pybind11.h>

#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "fastweights/core/error.hpp"

namespace fastweights::python {

/// A value that only one call uses at a time. Calls release the GIL, so that two Python threads, or
/// a callback, could otherwise meet in it.
template <class T>
class Guarded {
 public:
  /// @param name what errors call the value
  Guarded(const char* name, T value) : name_(name), value_(std::move(value)) {}

  /// Runs `work` on the value without the GIL.
  template <class Work>
  auto use(Work work) {
    const pybind11::gil_scoped_release no_gil;
    const std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock) {
      throw Error(name_ + ": another call is using it; one " + name_ + " does one thing at a time");
    }
    if (!value_) throw Error(name_ + ": it went back to where it was lent from");
    return work(*value_);
  }

  /// Takes the value out, after a call that uses it. Later ones throw Error.
  T take() {
    const pybind11::gil_scoped_release no_gil;
    const std::lock_guard lock(busy_);
    return std::move(*std::exchange(value_, std::nullopt));
  }

 private:
  std::string name_;
  std::optional<T> value_;
  std::mutex busy_;
};

}  // namespace fastweights::python
