#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

/// \file
/// Token ids at as few bytes each as their vocabulary allows, little-endian: how logs, stores and
/// state files hold a text. `Byte` is std::byte or std::uint8_t.

namespace fastweights::detail {

/// Bytes of a token in [0, vocabulary_size), at least 1.
constexpr std::int64_t token_bytes(std::int64_t vocabulary_size) {
  const int bits = std::bit_width(static_cast<std::uint64_t>(vocabulary_size - 1));
  return std::max<std::int64_t>(1, (bits + 7) / 8);
}

template <class Byte>
std::int64_t load_token(const Byte* from, std::int64_t width) {
  std::int64_t token = 0;
  for (std::int64_t i = 0; i < width; ++i) {
    token |= static_cast<std::int64_t>(from[i]) << (8 * i);
  }
  return token;
}

template <class Byte>
void store_token(std::int64_t token, std::int64_t width, Byte* to) {
  for (std::int64_t i = 0; i < width; ++i) to[i] = static_cast<Byte>(token >> (8 * i) & 0xFF);
}

}  // namespace fastweights::detail
