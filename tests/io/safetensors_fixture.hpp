/// \file
/// Safetensors files made by hand, so that malformed ones can be made as well.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

namespace fastweights::test {

inline std::string length_prefix(std::uint64_t length) {
  std::string prefix(8, '\0');
  for (std::size_t i = 0; i < prefix.size(); ++i) {
    prefix[i] = static_cast<char>(length >> (8 * i) & 0xff);
  }
  return prefix;
}

/// A file with this header and this data behind it.
inline std::string file_with(std::string_view header, std::string_view data) {
  return length_prefix(header.size()) + std::string(header) + std::string(data);
}

inline std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

inline std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace fastweights::test
