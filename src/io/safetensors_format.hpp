#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "fastweights/io/safetensors.hpp"

namespace fastweights::io::detail {

inline constexpr std::size_t kLengthBytes = 8;
inline constexpr std::uint64_t kLongestHeader = 100'000'000;  // the reference implementation's
inline constexpr std::size_t kHeaderAlignment = 8;
inline constexpr std::size_t kHighestRank = 64;
inline constexpr std::string_view kMetadataKey = "__metadata__";

struct ScalarTypeRow {
  ScalarType type;
  std::string_view name;
  std::size_t size;
};

/// In the order of the enumeration.
inline constexpr std::array<ScalarTypeRow, 10> kScalarTypes = {{
    {ScalarType::F64, "F64", 8},
    {ScalarType::F32, "F32", 4},
    {ScalarType::F16, "F16", 2},
    {ScalarType::BF16, "BF16", 2},
    {ScalarType::I64, "I64", 8},
    {ScalarType::I32, "I32", 4},
    {ScalarType::I16, "I16", 2},
    {ScalarType::I8, "I8", 1},
    {ScalarType::U8, "U8", 1},
    {ScalarType::BOOL, "BOOL", 1},
}};

}  // namespace fastweights::io::detail
