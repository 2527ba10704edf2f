#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
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
using Catch::Matchers::StartsWith;
using test::bytes_of;
using test::file_with;
using test::length_prefix;
using test::text_of;
using Shape = std::vector<std::int64_t>;

/// The view of a file that outlives it.
SafetensorsView parse(const std::string& file) {
  return SafetensorsView::parse(bytes_of(file), "'model'");
}

void check_refused(const std::string& file, const std::string& cause) {
  CHECK_THROWS_MATCHES(parse(file), FileError,
                       MessageMatches(StartsWith("'model': ") && ContainsSubstring(cause)));
}

/// A header with one tensor 'a' of these fields.
std::string one(std::string_view dtype, std::string_view shape, std::string_view offsets) {
  return R"({"a":{"dtype":)" + std::string(dtype) + R"(,"shape":)" + std::string(shape) +
         R"(,"data_offsets":)" + std::string(offsets) + "}}";
}

std::string u8(std::string_view name, std::size_t begin, std::size_t end) {
  return "\"" + std::string(name) + R"(":{"dtype":"U8","shape":[)" + std::to_string(end - begin) +
         R"(],"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) + "]}";
}

// ---- what is accepted

TEST_CASE("a view shows tensors where they lie", "[io][safetensors]") {
  const std::string file = file_with(
      R"({"b":{"dtype":"I16","shape":[2,1],"data_offsets":[8,12]},"__metadata__":{"k":"v","":""},)"
      R"("a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}  )",
      "AAAABBBBccdd");
  const SafetensorsView view = parse(file);
  REQUIRE(view.tensors().size() == 2);
  CHECK(view.tensors()[0] == TensorInfo{"a", ScalarType::F32, {2}, 0, 8});
  CHECK(view.tensors()[1] == TensorInfo{"b", ScalarType::I16, {2, 1}, 8, 12});
  CHECK(view.metadata() == Metadata{{"k", "v"}, {"", ""}});
  CHECK(view.find("b") == &view.tensors()[1]);
  CHECK(view.find("c") == nullptr);
  CHECK(view.find("__metadata__") == nullptr);
  CHECK(text_of(view.bytes(*view.find("b"))) == "ccdd");
  CHECK(text_of(view.bytes(*view.find("a"))).data() == file.data() + file.size() - 12);
}

TEST_CASE("every dtype is known by its name and size", "[io][safetensors]") {
  const auto [name, type, size] = GENERATE(table<std::string, ScalarType, std::size_t>({
      {"F64", ScalarType::F64, 8},
      {"F32", ScalarType::F32, 4},
      {"F16", ScalarType::F16, 2},
      {"BF16", ScalarType::BF16, 2},
      {"I64", ScalarType::I64, 8},
      {"I32", ScalarType::I32, 4},
      {"I16", ScalarType::I16, 2},
      {"I8", ScalarType::I8, 1},
      {"U8", ScalarType::U8, 1},
      {"BOOL", ScalarType::BOOL, 1},
  }));
  CHECK(scalar_type_name(type) == name);
  CHECK(element_size(type) == size);
  const std::string end = std::to_string(3 * size);
  const std::string file =
      file_with(one('"' + name + '"', "[3]", "[0," + end + "]"), std::string(3 * size, 'x'));
  CHECK(parse(file).find("a")->type == type);
}

TEST_CASE("a file without tensors, scalars and zero-size tensors are accepted",
          "[io][safetensors]") {
  CHECK(parse(file_with("{}", "")).tensors().empty());
  CHECK(parse(file_with(R"({"__metadata__":{}})", "")).metadata().empty());
  CHECK(parse(file_with(one(R"("F64")", "[]", "[0,8]"), "12345678")).find("a")->shape.empty());

  const std::string file = file_with("{" + u8("end", 3, 3) + "," + u8("all", 0, 3) + "," +
                                         u8("start", 0, 0) + "," + u8("also", 3, 3) + "}",
                                     "xyz");
  const SafetensorsView view = parse(file);
  std::vector<std::string> names;
  for (const TensorInfo& tensor : view.tensors()) names.push_back(tensor.name);
  CHECK(names == std::vector<std::string>{"start", "all", "also", "end"});
  CHECK(view.bytes(*view.find("end")).empty());
}

TEST_CASE("names may be any text", "[io][safetensors]") {
  const std::string file =
      file_with("{" + u8("", 0, 1) + "," + u8(R"(a\u0000b)", 1, 2) + "," + u8("größe", 2, 3) + "," +
                    u8(R"(\"\\\n\ud834\udd1e)", 3, 4) + "}",
                "wxyz");
  const SafetensorsView view = parse(file);
  CHECK(text_of(view.bytes(*view.find(""))) == "w");
  CHECK(text_of(view.bytes(*view.find("a\0b"s))) == "x");
  CHECK(text_of(view.bytes(*view.find("größe"))) == "y");
  CHECK(text_of(view.bytes(*view.find("\"\\\n𝄞"))) == "z");
}

TEST_CASE("tensors need not be aligned", "[io][safetensors]") {
  const std::string file = file_with(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                     R"("b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})",
                                     "a1234");
  CHECK(text_of(parse(file).bytes(*parse(file).find("b"))) == "1234");
}

TEST_CASE("the largest sizes that fit are taken for what they are", "[io][safetensors]") {
  CHECK(byte_count(ScalarType::U8, Shape{INT64_MAX}) == INT64_MAX);
  CHECK(byte_count(ScalarType::F64, Shape{INT64_MAX / 8}) == INT64_MAX - 7);
  CHECK(byte_count(ScalarType::F32, Shape{}) == 4);
  CHECK(byte_count(ScalarType::F32, Shape{1 << 30, 0, 1 << 30}) == 0);
  CHECK(byte_count(ScalarType::U8, Shape(64, 1)) == 1);
  CHECK_THROWS_AS(byte_count(ScalarType::U8, Shape(65, 1)), ShapeError);
  CHECK_THROWS_AS(byte_count(ScalarType::F64, Shape{INT64_MAX / 8 + 1}), ShapeError);
  CHECK_THROWS_AS(byte_count(ScalarType::F32, Shape{INT64_MAX, 0, 1}), ShapeError);
  CHECK_THROWS_AS(byte_count(ScalarType::F32, Shape{0, INT64_MAX}), ShapeError);
  CHECK_THROWS_AS(byte_count(ScalarType::F32, Shape{-1}), ShapeError);
  CHECK_THROWS_AS(byte_count(ScalarType::F32, Shape{INT64_MIN, INT64_MIN}), ShapeError);
}

TEST_CASE("a view does not read beyond its file for a foreign tensor", "[io][safetensors]") {
  const std::string file = file_with("{" + u8("a", 0, 4) + "}", "1234");
  const SafetensorsView view = parse(file);
  CHECK_THROWS_AS(view.bytes({.name = "b", .shape = {5}, .begin = 0, .end = 5}), Error);
  CHECK_THROWS_AS(view.bytes({.name = "b", .shape = {}, .begin = 3, .end = 2}), Error);
}

// ---- what is refused

TEST_CASE("a length of the header that cannot be is refused", "[io][safetensors]") {
  check_refused("", "it has 0 bytes");
  check_refused("1234567", "it has 7 bytes");
  check_refused(length_prefix(3) + "{}",
                "the file is cut off: the header's length is 3, but only 2");
  check_refused(length_prefix(100'000'001), "100000001, above the limit of 100000000");
  check_refused(length_prefix(UINT64_MAX) + "{}", "above the limit");
  check_refused(length_prefix(std::uint64_t{1} << 63) + "{}", "above the limit");
}

TEST_CASE("a header that is no JSON object is refused", "[io][safetensors]") {
  const auto [header, cause] = GENERATE(table<std::string, std::string>({
      {"", "must begin with '{'"},
      {"[]", "must begin with '{'"},
      {" {}", "must begin with '{'"},
      {"\xef\xbb\xbf{}", "must begin with '{'"},
      {"{", "not valid JSON at byte 2"},
      {"{} {}", "not valid JSON at byte 4"},
      {"{}x", "not valid JSON at byte 3"},
      {"{}\0"s, "not valid JSON at byte 3"},
      {"{\0}"s, "not valid JSON at byte 2"},
      {"{'a':1}", "not valid JSON at byte 2"},
      {"{\"a\xff\":1}", "not valid JSON at byte 4"},
      {R"({"\ud800":1})", "not valid JSON"},
      {R"({"a":1e400})", "not valid JSON"},
      {R"({/**/})", "not valid JSON at byte 2"},
      {R"({"__metadata__":{},})", "not valid JSON"},
  }));
  CAPTURE(header);
  check_refused(file_with(header, ""), cause);
}

TEST_CASE("fields of a wrong kind, missing, unknown or there twice are refused",
          "[io][safetensors]") {
  const auto [header, cause] = GENERATE(table<std::string, std::string>({
      {R"({"a":null})", "tensor 'a': must be an object, got null"},
      {R"({"a":[]})", "tensor 'a': must be an object, got an array"},
      {R"({"a":{}})", "tensor 'a': has no dtype"},
      {R"({"a":{"dtype":"U8"}})", "tensor 'a': has no shape"},
      {R"({"a":{"dtype":"U8","shape":[]}})", "tensor 'a': has no data_offsets"},
      {R"({"a":{"dtype":"U8","extra":0}})", "tensor 'a': has an unknown field 'extra'"},
      {R"({"a":{"dtype":"U8","dtype":"U8"}})", "tensor 'a': dtype is there twice"},
      {R"({"a":{"shape":[],"shape":[]}})", "tensor 'a': shape is there twice"},
      {R"({"a":{"data_offsets":[0,0],"data_offsets":[0,0]}})", "data_offsets is there twice"},
      {R"({"a\u0000\n":{"dtype":true}})", R"(tensor 'a\x00\x0a': dtype must be a string)"},
      {one("8", "[]", "[0,1]"), "dtype must be a string, got a non-negative integer"},
      {one(R"("F33")", "[]", "[0,1]"), "unknown dtype 'F33'; known are F64 F32"},
      {one(R"("f32")", "[]", "[0,1]"), "unknown dtype 'f32'"},
      {one(R"("U8")", "1", "[0,1]"), "shape must be an array, got a non-negative integer"},
      {one(R"("U8")", "{}", "[0,1]"), "shape must be an array, got an object"},
      {one(R"("U8")", "[[1]]", "[0,1]"), "shape must hold non-negative integers, got an array"},
      {one(R"("U8")", "[-1]", "[0,1]"), "shape must hold non-negative integers, got a negative"},
      {one(R"("U8")", "[1.0]", "[0,1]"), "shape must hold non-negative integers, got a fraction"},
      {one(R"("U8")", R"(["1"])", "[0,1]"), "got a string"},
      {one(R"("U8")", "[true]", "[0,1]"), "got a boolean"},
      {one(R"("U8")", "[99999999999999999999]", "[0,1]"), "got a fraction or huge number"},
      {one(R"("U8")", "[9223372036854775808]", "[0,1]"), "9223372036854775808 is too large"},
      {one(R"("U8")", "[1]", "[]"), "data_offsets must hold 2 numbers, got 0"},
      {one(R"("U8")", "[1]", "[0]"), "data_offsets must hold 2 numbers, got 1"},
      {one(R"("U8")", "[1]", "[0,1,2]"), "data_offsets must hold 2 numbers, got more"},
      {one(R"("U8")", "[1]", "[-1,0]"), "data_offsets must hold non-negative integers"},
      {one(R"("U8")", "[1]", "0"), "data_offsets must be an array"},
      {R"({"__metadata__":null})", "__metadata__ must be an object, got null"},
      {R"({"__metadata__":{"a":1}})", "__metadata__ must hold strings only, got a non-negative"},
      {R"({"__metadata__":{"a":{}}})", "__metadata__ must hold strings only, got an object"},
      {R"({"__metadata__":{"a":"1","\u0061":"2"}})", "__metadata__ has the key 'a' twice"},
      {R"({"__metadata__":{},"__metadata__":{}})", "__metadata__ is there twice"},
      {"{" + u8("a", 0, 1) + "," + u8("b", 1, 1) + "," + u8(R"(\u0061)", 1, 1) + "}",
       "tensor 'a' is there twice"},
  }));
  CAPTURE(header);
  check_refused(file_with(header, "x"), cause);
}

TEST_CASE("sizes that overflow are refused", "[io][safetensors]") {
  const std::string shape =
      GENERATE(as<std::string>(), "[9223372036854775807]", "[4294967296,4294967296]",
               "[0,9223372036854775807]", "[4611686018427387904,2,0]", "[3,3074457345618258603]");
  CAPTURE(shape);
  check_refused(file_with(one(R"("F32")", shape, "[0,0]"), ""), "larger than any memory");
}

TEST_CASE("tensors of too many dimensions are refused", "[io][safetensors]") {
  std::string shape = "[1";
  for (int i = 1; i < 64; ++i) shape += ",1";
  CHECK(parse(file_with(one(R"("U8")", shape + "]", "[0,1]"), "x")).tensors().size() == 1);
  check_refused(file_with(one(R"("U8")", shape + ",1]", "[0,1]"), "x"),
                "shape has more than 64 dimensions");
}

TEST_CASE("offsets that do not fit are refused", "[io][safetensors]") {
  const auto [header, cause] = GENERATE(table<std::string, std::string>({
      {one(R"("F32")", "[1]", "[4,0]"), "data_offsets that run backwards: [4, 0]"},
      {one(R"("F32")", "[2]", "[0,4]"), "F32 [2], needs 8 bytes, but its data_offsets are [0, 4]"},
      {one(R"("F32")", "[0]", "[0,4]"), "F32 [0], needs 0 bytes, but its data_offsets are [0, 4]"},
      {one(R"("F32")", "[2]", "[0,8]"), "cut off: tensor 'a', F32 [2], ends at byte 8 of the data"},
      {one(R"("F32")", "[1]", "[1,5]"), "ends at byte 5 of the data, but only 4 bytes"},
      {one(R"("U8")", "[0]", "[18446744073709551615,18446744073709551615]"), "cut off"},
      {one(R"("U8")", "[1]", "[18446744073709551615,0]"), "run backwards"},
      {one(R"("U8")", "[3]", "[1,4]"), "begins at byte 1 of the data, with a gap behind"},
      {one(R"("U8")", "[3]", "[0,3]"), "the tensors end at byte 3 of the data, but 1 more bytes"},
      {"{}", "the tensors end at byte 0 of the data, but 4 more bytes follow"},
      {"{" + u8("a", 0, 3) + "," + u8("b", 2, 4) + "}",
       "tensor 'b', U8 [2], begins at byte 2 of the "
       "data, inside the tensor before, which ends at byte 3"},
      {"{" + u8("a", 0, 4) + "," + u8("b", 0, 4) + "}", "tensor 'b', U8 [4], begins at byte 0"},
      {"{" + u8("a", 0, 4) + "," + u8("b", 2, 2) + "}", "tensor 'b', U8 [0], begins at byte 2"},
      {"{" + u8("a", 0, 1) + "," + u8("b", 2, 4) + "}",
       "tensor 'b', U8 [2], begins at byte 2 of the "
       "data, with a gap behind the tensor before, which ends at byte 1"},
  }));
  CAPTURE(header);
  check_refused(file_with(header, "1234"), cause);
}

TEST_CASE("deep nesting is refused without deep recursion", "[io][safetensors]") {
  const auto [open, cause] = GENERATE(table<std::string, std::string>({
      {R"({"a":)", "tensor 'a': has an unknown field 'a'"},
      {R"({"__metadata__":)", "has an unknown field"},
      {"[", "must hold non-negative integers, got an array"},
  }));
  constexpr int kDepth = 1'000'000;
  std::string header = open == "[" ? R"({"a":{"shape":)" : R"({"a":)";
  header.reserve(header.size() + kDepth * open.size());
  for (int i = 0; i < kDepth; ++i) header += open;
  check_refused(file_with(header, ""), cause);
}

TEST_CASE("a file that is cut off anywhere, or longer, is refused", "[io][safetensors]") {
  const std::string file = file_with(
      "{" + u8("a", 0, 3) + R"(,"b":{"dtype":"F32","shape":[1,2],"data_offsets":[3,11]}})",
      "123abcdefgh");
  REQUIRE_NOTHROW(parse(file));
  for (std::size_t length = 0; length < file.size(); ++length) {
    CAPTURE(length);
    CHECK_THROWS_AS(parse(file.substr(0, length)), FileError);
  }
  check_refused(file + "i", "1 more bytes follow");
}

TEST_CASE("an altered byte is refused or gives tensors that lie within the file",
          "[io][safetensors]") {
  std::string file = file_with("{" + u8("a", 0, 3) + "," + u8("b", 3, 12) + "}", "123456789abc");
  const auto is_refused = [&] {
    try {
      const SafetensorsView view = parse(file);
      std::size_t covered = 0;
      for (const TensorInfo& tensor : view.tensors()) covered += view.bytes(tensor).size();
      REQUIRE(covered == 12);
      return false;
    } catch (const FileError&) {
      return true;
    }
  };
  std::size_t refused = 0;
  const std::size_t header_end = file.size() - 12;
  for (std::size_t i = 0; i < header_end * 256; ++i) {
    const char before = std::exchange(file[i / 256], static_cast<char>(i % 256));
    refused += is_refused() ? 1 : 0;
    file[i / 256] = before;
  }
  // The rest are files in their own right: another letter in a name, "I8" instead of "U8".
  CHECK(refused > header_end * 250);
}

// ---- files

TEST_CASE("errors of a file name the file", "[io][safetensors]") {
  const test::TemporaryFolder folder;
  test::put(folder / "bad.safetensors", file_with("{}", "x"));
  CHECK_THROWS_MATCHES(SafetensorsFile(folder / "bad.safetensors"), FileError,
                       MessageMatches(ContainsSubstring("bad.safetensors': the tensors end")));
  CHECK_THROWS_MATCHES(SafetensorsFile(folder / "none.safetensors"), FileError,
                       MessageMatches(ContainsSubstring("none.safetensors': No such file")));
}

TEST_CASE("a file and its view can be moved", "[io][safetensors]") {
  const test::TemporaryFolder folder;
  test::put(folder / "file", file_with("{" + u8("a", 0, 3) + "}", "xyz"));
  SafetensorsFile file(folder / "file");
  const SafetensorsFile moved = std::move(file);
  CHECK(text_of(moved.view().bytes(*moved.view().find("a"))) == "xyz");
}

TEST_CASE("tensors beyond 4 GiB are found", "[io][safetensors]") {
  constexpr std::size_t kFirst = (std::size_t{1} << 32) + 3;
  const std::string head =
      file_with("{" + u8("huge", 0, kFirst) + "," + u8("last", kFirst, kFirst + 4) + "}", "");
  const test::TemporaryFolder folder;
  test::put(folder / "sparse", head);
  std::filesystem::resize_file(folder / "sparse", head.size() + kFirst);
  std::ofstream(folder / "sparse", std::ios::binary | std::ios::app) << "tail";

  const SafetensorsFile file(folder / "sparse");
  const TensorInfo* const huge = file.view().find("huge");
  REQUIRE(huge != nullptr);
  CHECK(huge->shape == Shape{static_cast<std::int64_t>(kFirst)});
  CHECK(file.view().bytes(*huge).size() == kFirst);
  CHECK(text_of(file.view().bytes(*file.view().find("last"))) == "tail");
}

}  // namespace
}  // namespace fastweights::io
