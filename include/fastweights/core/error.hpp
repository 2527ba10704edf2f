/// \file
/// The exceptions of the library. Every message names the thing (operator, tensor, file), what was
/// expected and what came, e.g. `delta_rule: beta must be [B, T, HV] = [2, 64, 8], got [2, 64, 4]`.
///
/// Python has the same names in `fastweights`; there each is also a built-in exception.
#pragma once

#include <stdexcept>

namespace fastweights {

/// Base of everything the library throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A tensor of a wrong shape, dtype or device. Python: also `ValueError`.
class ShapeError : public Error {
 public:
  using Error::Error;
};

/// A file that cannot be read or written, or whose content is malformed. Python: also `OSError`.
class FileError : public Error {
 public:
  using Error::Error;
};

/// A state, or a set of weights, that belongs to another model. Python: also `RuntimeError`.
class StateMismatch : public Error {
 public:
  using Error::Error;
};

/// A long call that the caller stopped. Python: also `InterruptedError`.
class Cancelled : public Error {
 public:
  using Error::Error;
};

}  // namespace fastweights
