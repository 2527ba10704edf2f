#include "fastweights/io/tokenizer.hpp"

#include <cstddef>

#include "fastweights/core/error.hpp"

namespace fastweights::io {

std::vector<std::int64_t> ByteTokenizer::encode(std::string_view text) const {
  const auto* const bytes = reinterpret_cast<const unsigned char*>(text.data());
  return std::vector<std::int64_t>(bytes, bytes + text.size());
}

std::string ByteTokenizer::decode(std::span<const std::int64_t> tokens) const {
  std::string text;
  text.reserve(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= kVocabularySize) {
      throw Error("ByteTokenizer: token " + std::to_string(i) + " must be in [0, 256), got " +
                  std::to_string(tokens[i]));
    }
    text.push_back(static_cast<char>(tokens[i]));
  }
  return text;
}

}  // namespace fastweights::io
