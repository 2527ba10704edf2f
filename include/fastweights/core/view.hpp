#pragma once

#include <cstddef>
#include <cstdint>

#include "fastweights/core/dtype.hpp"

namespace fastweights::core {

/// A read-only tensor of rows, `[batch, time, head, size]` or, for scalars per head, `[batch, time,
/// head]`. Strides count elements; the elements of a row are adjacent.
struct ConstView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t batch_stride = 0;
  std::int64_t time_stride = 0;
  std::int64_t head_stride = 0;

  explicit operator bool() const { return data != nullptr; }

  const void* at(std::int64_t batch, std::int64_t time, std::int64_t head) const {
    const auto offset = batch * batch_stride + time * time_stride + head * head_stride;
    return static_cast<const std::byte*>(data) + offset * static_cast<std::int64_t>(size_of(dtype));
  }
};

/// The same, written to. Rows never overlap.
struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t batch_stride = 0;
  std::int64_t time_stride = 0;
  std::int64_t head_stride = 0;

  explicit operator bool() const { return data != nullptr; }

  void* at(std::int64_t batch, std::int64_t time, std::int64_t head) const {
    const auto offset = batch * batch_stride + time * time_stride + head * head_stride;
    return static_cast<std::byte*>(data) + offset * static_cast<std::int64_t>(size_of(dtype));
  }
};

}  // namespace fastweights::core
