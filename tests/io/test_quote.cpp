#include "fastweights/io/quote.hpp"

#include <string>
#include <string_view>

#include <catch2/catch_test_macros.hpp>

namespace fastweights::io {
namespace {

using namespace std::string_view_literals;

TEST_CASE("quote leaves printable text and UTF-8 as they are", "[io][quote]") {
  CHECK(quote("") == "''");
  CHECK(quote("blocks.0.memory ~") == "'blocks.0.memory ~'");
  CHECK(quote("Größe €𝄞") == "'Größe €𝄞'");
}

TEST_CASE("quote escapes control characters, quotes and backslashes", "[io][quote]") {
  CHECK(quote("a\0b\n\x7f"sv) == R"('a\x00b\x0a\x7f')");
  CHECK(quote(R"(it's \)") == R"('it\'s \\')");
}

TEST_CASE("quote escapes bytes that are no UTF-8", "[io][quote]") {
  CHECK(quote("\xff\x80") == R"('\xff\x80')");
  CHECK(quote("\xc0\xaf") == R"('\xc0\xaf')");                  // overlong
  CHECK(quote("\xed\xa0\x80") == R"('\xed\xa0\x80')");          // a surrogate
  CHECK(quote("\xf4\x90\x80\x80") == R"('\xf4\x90\x80\x80')");  // above U+10FFFF
  CHECK(quote("\xe2\x82") == R"('\xe2\x82')");                  // cut off
  CHECK(quote("\xe2\x82z") == R"('\xe2\x82z')");
}

TEST_CASE("quote cuts long text between characters", "[io][quote]") {
  CHECK(quote(std::string(1000, 'x')) == "'" + std::string(1000, 'x') + "'");
  CHECK(quote(std::string(1001, 'x')) == "'" + std::string(1000, 'x') + "'...");
  CHECK(quote(std::string(999, 'x') + "€€") == "'" + std::string(999, 'x') + "€'...");
}

}  // namespace
}  // namespace fastweights::io
