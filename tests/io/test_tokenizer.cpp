#include "fastweights/io/tokenizer.hpp"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>

#include "fastweights/core/error.hpp"

namespace fastweights::io {
namespace {

using Tokens = std::vector<std::int64_t>;

TEST_CASE("a token is a byte", "[io][tokenizer]") {
  const ByteTokenizer tokenizer;
  STATIC_REQUIRE(ByteTokenizer::vocabulary_size() == 256);
  CHECK(tokenizer.encode("").empty());
  CHECK(tokenizer.encode("Az\n") == Tokens{65, 122, 10});
  CHECK(tokenizer.encode("é\xff") == Tokens{0xc3, 0xa9, 0xff});
}

TEST_CASE("every byte survives encoding and decoding", "[io][tokenizer]") {
  std::string text;
  for (int byte = 255; byte >= 0; --byte) text.push_back(static_cast<char>(byte));
  const ByteTokenizer tokenizer;
  const Tokens tokens = tokenizer.encode(text);
  REQUIRE(tokens.size() == 256);
  CHECK(tokens.front() == 255);
  CHECK(tokenizer.decode(tokens) == text);
  CHECK(tokenizer.decode({}).empty());
}

TEST_CASE("decode refuses what is no byte and says where it stands", "[io][tokenizer]") {
  const ByteTokenizer tokenizer;
  const auto refused = [&](std::int64_t token) {
    const std::string message =
        "ByteTokenizer: token 1 must be in [0, 256), got " + std::to_string(token);
    CHECK_THROWS_MATCHES(tokenizer.decode(Tokens{0, token}), Error,
                         Catch::Matchers::Message(message));
  };
  refused(-1);
  refused(256);
  refused(std::numeric_limits<std::int64_t>::min());
  refused(std::numeric_limits<std::int64_t>::max());
}

}  // namespace
}  // namespace fastweights::io
