#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "fastweights/core/error.hpp"
#include "fastweights/io/safetensors.hpp"
#include "file_fixture.hpp"
#include "safetensors_fixture.hpp"

namespace fastweights::io {
namespace {

using namespace std::string_literals;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;
using test::bytes_of;
using test::length_prefix;
using test::text_of;
using Tensors = std::vector<TensorData>;

std::string serialized(const Tensors& tensors, const Metadata& metadata = {}) {
  return std::string(text_of(serialize_safetensors(tensors, metadata)));
}

Tensors odd_sizes() {
  return {
      {"a", ScalarType::U8, {3}, bytes_of("uuu")},
      {"d", ScalarType::F64, {1}, bytes_of("dddddddd")},
      {"c", ScalarType::BOOL, {}, bytes_of("\1")},
      {"b", ScalarType::BF16, {1, 3}, bytes_of("bbbbbb")},
      {"e", ScalarType::F32, {1}, bytes_of("ffff")},
      {"z", ScalarType::I64, {0, 5}, {}},
  };
}

TEST_CASE("a written file is, byte for byte, what the format says", "[io][safetensors]") {
  const Tensors tensors = {{"b", ScalarType::U8, {2}, bytes_of("xy")},
                           {"a", ScalarType::F32, {1, 1}, bytes_of("1234")}};
  const std::string header = R"({"__metadata__":{"format":"pt"},)"
                             R"("a":{"dtype":"F32","shape":[1, 1],"data_offsets":[0, 4]},)"
                             R"("b":{"dtype":"U8","shape":[2],"data_offsets":[4, 6]}})";
  const std::string padding((8 - header.size() % 8) % 8, ' ');
  CHECK(serialized(tensors, {{"format", "pt"}}) ==
        length_prefix(header.size() + padding.size()) + header + padding + "1234xy");
  CHECK(serialized({}) == length_prefix(8) + "{}      ");
}

TEST_CASE("the order of the tensors does not matter", "[io][safetensors]") {
  Tensors tensors = odd_sizes();
  const std::string expected = serialized(tensors);
  for (int i = 0; i < 6; ++i) {
    std::rotate(tensors.begin(), tensors.begin() + 1, tensors.end());
    CHECK(serialized(tensors) == expected);
  }
  std::ranges::reverse(tensors);
  CHECK(serialized(tensors) == expected);
}

TEST_CASE("every tensor is aligned for its type", "[io][safetensors]") {
  for (std::size_t length = 1; length < 20; ++length) {
    Tensors tensors = odd_sizes();
    tensors[0].name = std::string(length, 'n');  // headers of every length modulo 8
    const std::string file = serialized(tensors);
    const SafetensorsView view = SafetensorsView::parse(bytes_of(file));
    for (const TensorInfo& tensor : view.tensors()) {
      CAPTURE(tensor.name);
      const std::ptrdiff_t offset = text_of(view.bytes(tensor)).data() - file.data();
      CHECK(offset % static_cast<std::ptrdiff_t>(element_size(tensor.type)) == 0);
    }
  }
}

TEST_CASE("what was written is read again", "[io][safetensors]") {
  const Metadata metadata = {{"", "empty"}, {"größe\0"s, "\"\\\n\x7f"}, {"k", ""}};
  Tensors tensors = odd_sizes();
  tensors[0].name = "";
  tensors[1].name = "a\0b"s;
  tensors[2].name = "\"quote\" \\ \n größe 𝄞 \x7f";
  const std::string file = serialized(tensors, metadata);
  const SafetensorsView view = SafetensorsView::parse(bytes_of(file));
  CHECK(view.metadata() == metadata);
  REQUIRE(view.tensors().size() == tensors.size());
  for (const TensorData& tensor : tensors) {
    CAPTURE(tensor.name);
    const TensorInfo* const found = view.find(tensor.name);
    REQUIRE(found != nullptr);
    CHECK(found->type == tensor.type);
    CHECK(found->shape == tensor.shape);
    CHECK(text_of(view.bytes(*found)) == text_of(tensor.bytes));
  }
}

TEST_CASE("a file holds what is made in memory, in the mode that is asked for",
          "[io][safetensors]") {
  const test::TemporaryFolder folder;
  write_safetensors(folder / "file", odd_sizes(), {{"k", "v"}}, kPrivateMode);
  CHECK(test::get(folder / "file") == serialized(odd_sizes(), {{"k", "v"}}));
  CHECK(static_cast<unsigned>(std::filesystem::status(folder / "file").permissions()) == 0600);
}

TEST_CASE("what cannot be written is refused and the old file stays", "[io][safetensors]") {
  const test::TemporaryFolder folder;
  test::put(folder / "file", "old");
  const auto refused = [&](const Tensors& tensors, const std::string& cause,
                           const Metadata& metadata = {}) {
    CHECK_THROWS_MATCHES(write_safetensors(folder / "file", tensors, metadata), Error,
                         MessageMatches(ContainsSubstring(cause)));
    CHECK(test::names_in(folder.path()) == std::vector<std::string>{"file"});
    CHECK(test::get(folder / "file") == "old");
  };
  const auto four = bytes_of("1234");
  refused({{"a", ScalarType::F32, {2}, four}}, "tensor 'a', F32 [2], must have 8 bytes, got 4");
  refused({{"a", ScalarType::F32, {0}, four}}, "must have 0 bytes, got 4");
  refused({{"a", ScalarType::F32, {-1}, four}}, "must have a shape that fits into memory");
  refused({{"a", ScalarType::F32, {INT64_MAX, 2}, four}}, "a shape that fits into memory");
  refused({{"a", ScalarType::F32, {1}, four}, {"a", ScalarType::U8, {4}, four}},
          "tensor 'a' is there twice");
  refused({{"__metadata__", ScalarType::F32, {1}, four}}, "may have the name '__metadata__'");
  refused({{"a\xff", ScalarType::F32, {1}, four}}, R"(must be UTF-8, got 'a\xff')");
  refused({}, "must be UTF-8", {{"k", "\xc3"}});
  refused({}, "must be UTF-8", {{"\xc3", "v"}});
  refused({}, "above the limit of 100000000", {{"k", std::string(100'000'000, 'x')}});
}

TEST_CASE("a wrong size is a ShapeError", "[io][safetensors]") {
  CHECK_THROWS_AS(serialize_safetensors(Tensors{{"a", ScalarType::F32, {1}, {}}}), ShapeError);
}

}  // namespace
}  // namespace fastweights::io
