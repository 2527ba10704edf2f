#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace fastweights::core {

/// Element types that the kernels read and write. Arithmetic is never below fp32.
enum class DType : std::uint8_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
  }
  return 0;
}

/// The element type of the arithmetic: float or double.
template <class Real>
constexpr DType dtype_of() {
  static_assert(std::is_same_v<Real, float> || std::is_same_v<Real, double>);
  return std::is_same_v<Real, double> ? DType::kFloat64 : DType::kFloat32;
}

/// The name that PyTorch uses, for messages.
constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
  }
  return "unknown";
}

}  // namespace fastweights::core
