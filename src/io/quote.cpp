#include "fastweights/io/quote.hpp"

#include <array>
#include <cstddef>

namespace fastweights::io {
namespace {

constexpr std::size_t kLongestQuote = 1000;

struct Utf8Row {
  unsigned char first_low, first_high, second_low, second_high;
  std::size_t length;
};

// Well-formed UTF-8 byte sequences (The Unicode Standard, table 3-7). A third or fourth byte is
// always 80..BF.
constexpr std::array<Utf8Row, 8> kUtf8Rows = {{
    {0xC2, 0xDF, 0x80, 0xBF, 2},
    {0xE0, 0xE0, 0xA0, 0xBF, 3},
    {0xE1, 0xEC, 0x80, 0xBF, 3},
    {0xED, 0xED, 0x80, 0x9F, 3},
    {0xEE, 0xEF, 0x80, 0xBF, 3},
    {0xF0, 0xF0, 0x90, 0xBF, 4},
    {0xF1, 0xF3, 0x80, 0xBF, 4},
    {0xF4, 0xF4, 0x80, 0x8F, 4},
}};

constexpr bool within(char byte, unsigned char low, unsigned char high) {
  const auto value = static_cast<unsigned char>(byte);
  return low <= value && value <= high;
}

constexpr bool matches(std::string_view text, const Utf8Row& row) {
  if (text.size() < row.length || !within(text[0], row.first_low, row.first_high) ||
      !within(text[1], row.second_low, row.second_high)) {
    return false;
  }
  for (const char byte : text.substr(2, row.length - 2)) {
    if (!within(byte, 0x80, 0xBF)) return false;
  }
  return true;
}

/// How many bytes at the start of the (non-empty) text can be printed as they are: 0 if none.
constexpr std::size_t printable_length(std::string_view text) {
  if (within(text[0], 0x20, 0x7E)) return text[0] == '\'' || text[0] == '\\' ? 0 : 1;
  for (const Utf8Row& row : kUtf8Rows) {
    if (matches(text, row)) return row.length;
  }
  return 0;
}

std::string escaped(char byte) {
  if (byte == '\'' || byte == '\\') return {'\\', byte};
  constexpr std::string_view kDigits = "0123456789abcdef";
  const auto value = static_cast<unsigned char>(byte);
  return {'\\', 'x', kDigits[value >> 4], kDigits[value & 15]};
}

}  // namespace

std::string quote(std::string_view text) {
  std::string result = "'";
  std::size_t at = 0;
  while (at < text.size() && at < kLongestQuote) {
    const std::size_t length = printable_length(text.substr(at));
    result += length > 0 ? std::string(text.substr(at, length)) : escaped(text[at]);
    at += length > 0 ? length : 1;
  }
  return result + (at < text.size() ? "'..." : "'");
}

}  // namespace fastweights::io
