#pragma once

#include <cstddef>
#include <cstdint>

#include "fastweights/core/dtype.hpp"

namespace fastweights::core {

/// Read-only elements that lie one after another.
struct ConstArray {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;

  explicit operator bool() const { return data != nullptr; }
  const void* at(std::int64_t index) const {
    return static_cast<const std::byte*>(data) + index * static_cast<std::int64_t>(size_of(dtype));
  }
};

/// The same, written to.
struct Array {
  void* data = nullptr;
  DType dtype = DType::kFloat32;

  explicit operator bool() const { return data != nullptr; }
  void* at(std::int64_t index) const {
    return static_cast<std::byte*>(data) + index * static_cast<std::int64_t>(size_of(dtype));
  }
};

}  // namespace fastweights::core
