#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "fastweights/session/session.hpp"
#include "guarded.hpp"

// What the calls of sessions and of their pool share. The callables that these functions return
// refer to their arguments, and are called without the GIL.

namespace fastweights::python {

using GuardedSession = Guarded<Session>;

/// Runs the Python handlers of signals that came in; Ctrl-C arrives as KeyboardInterrupt.
inline void check_signals() {
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

/// What a callback answers: None means to go on.
inline bool goes_on(const pybind11::object& answer) {
  return answer.is_none() || pybind11::bool_(answer);
}

inline Progress progress_of(const pybind11::object& callback) {
  return [&callback](std::int64_t done, std::int64_t total) {
    const pybind11::gil_scoped_acquire gil;
    check_signals();
    return callback.is_none() || goes_on(callback(done, total));
  };
}

inline std::function<bool(std::string_view)> on_token_of(const pybind11::object& callback) {
  return [&callback](std::string_view bytes) {
    const pybind11::gil_scoped_acquire gil;
    check_signals();
    return callback.is_none() || goes_on(callback(pybind11::bytes(bytes.data(), bytes.size())));
  };
}

inline std::function<std::string(std::string_view, std::int64_t)> guess_of(
    const pybind11::object& callback) {
  return [&callback](std::string_view text, std::int64_t most) {
    const pybind11::gil_scoped_acquire gil;
    return std::string(pybind11::bytes(callback(pybind11::bytes(text.data(), text.size()), most)));
  };
}

}  // namespace fastweights::python
