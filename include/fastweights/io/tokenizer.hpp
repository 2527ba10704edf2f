#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fastweights::io {

/// Text as bytes: token `i` is byte `i`, so every text has exactly one encoding and every sequence
/// of tokens decodes, whether it is UTF-8 or not.
class ByteTokenizer {
 public:
  static constexpr std::int64_t kVocabularySize = 256;

  [[nodiscard]] static constexpr std::int64_t vocabulary_size() noexcept { return kVocabularySize; }

  /// One id in [0, 256) per byte.
  [[nodiscard]] std::vector<std::int64_t> encode(std::string_view text) const;

  /// The inverse. Throws Error, naming the id and its position, if one is no byte.
  [[nodiscard]] std::string decode(std::span<const std::int64_t> tokens) const;
};

}  // namespace fastweights::io
