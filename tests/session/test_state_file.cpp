#include <algorithm>
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/io/mapped_file.hpp"
#include "fastweights/session/state_file.hpp"
#include "file_fixture.hpp"

using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;
using fastweights::CallKind;
using fastweights::FileError;
using fastweights::parse_state_file;
using fastweights::serialize_state_file;
using fastweights::StateFile;
using fastweights::detail::seal_state_file;
namespace io = fastweights::io;
using Buffer = std::vector<std::byte>;

namespace {

const std::vector<float> kValues{1.5F, -2.0F, 3.25F, 0.0F, 1e-40F, -0.0F};
const std::vector<std::int64_t> kPosition{6};

StateFile example() {
  StateFile file{.model = "0123456789abcdef0123456789abcdef",
                 .piece = 512,
                 .journal_bytes = 1 << 20,
                 .limited_writes = 9,
                 .base_limited_writes = 2,
                 .policy = {.strength = 0.5F,
                            .surprise = fastweights::SurpriseGate{1.0, 5.0, 0.25F, 1.5F},
                            .memory_norm_cap = 3.0},
                 .end_to_end = fastweights::EndToEndOptions{0.25, 48, 2.5},
                 .log = fastweights::SessionLog(256, {7, 4, 3, {0xFFFFFFFFFFFFFFFFU, 3}}),
                 .marks = {},
                 .checkpoints = {{7, 2}, {12, 9}},
                 .tensors = {}};
  file.log.start_call(CallKind::kRead, std::vector<std::int64_t>{104, 101, 255, 0});
  file.log.start_call(CallKind::kWritten, std::vector<std::int64_t>{33, 34}, 77);
  file.log.set_strength(9, 11, 0.25F);
  file.marks = {{{0xFFFFFFFFFFFFFFFFU}, 3, fastweights::MarkStatus::kCommitted},
                {{1}, 8, fastweights::MarkStatus::kValid},
                {{2}, 13, fastweights::MarkStatus::kValid}};
  file.tensors.push_back(
      {"logits", io::ScalarType::F32, {2, 3}, std::as_bytes(std::span(kValues))});
  file.tensors.push_back(
      {"position", io::ScalarType::I64, {1}, std::as_bytes(std::span(kPosition))});
  file.tensors.push_back({"empty", io::ScalarType::BF16, {0, 7}, {}});
  return file;
}

/// The content of a file whose parts can be changed one by one: what only a forger would write.
struct Forgery {
  io::Metadata metadata = {{"model", "0123456789abcdef0123456789abcdef"},
                           {"vocabulary_size", "256"},
                           {"piece", "512"},
                           {"journal_bytes", "1000"},
                           {"limited_writes", "0"},
                           {"seed", "1"},
                           {"base_read", "0"},
                           {"base_written", "0"},
                           {"base_draws", "0"},
                           {"base_limited_writes", "0"}};
  std::vector<std::uint8_t> tokens = {104, 101, 255};
  std::vector<std::int64_t> tokens_shape = {3, 1};
  std::vector<std::int64_t> calls = {0, 2, 0, 0, 1, 1, 1, 77};
  std::vector<std::int64_t> calls_shape = {2, 4};
  std::vector<std::int64_t> strengths = {};
  std::vector<std::int64_t> marks = {};
  std::vector<std::int64_t> checkpoints = {};
  std::vector<std::vector<double>> policy = {};
  std::vector<std::vector<double>> end_to_end = {};
  std::uint32_t version = 2;

  Buffer file() const {
    const auto table = [](const char* name, const std::vector<std::int64_t>& rows,
                          std::int64_t fields) {
      return io::TensorData{name,
                            io::ScalarType::I64,
                            {std::ssize(rows) / fields, fields},
                            std::as_bytes(std::span(rows))};
    };
    const auto bits_of = [](const std::vector<std::vector<double>>& rows) {
      std::vector<std::int64_t> bits;
      for (const auto& row : rows) {
        for (const double each : row) bits.push_back(std::bit_cast<std::int64_t>(each));
      }
      return bits;
    };
    const auto policy_bits = bits_of(policy);
    const auto end_to_end_bits = bits_of(end_to_end);
    std::vector<io::TensorData> tensors = {
        {"log.tokens", io::ScalarType::U8, tokens_shape, std::as_bytes(std::span(tokens))},
        {"log.calls", io::ScalarType::I64, calls_shape, std::as_bytes(std::span(calls))},
        table("log.strengths", strengths, 3),
        table("log.marks", marks, 3),
        table("log.checkpoints", checkpoints, 2)};
    if (!policy.empty()) tensors.push_back(table("session.policy", policy_bits, 4));
    if (!end_to_end.empty()) tensors.push_back(table("session.end_to_end", end_to_end_bits, 3));
    const std::size_t known = version == 1 ? 2 : tensors.size();
    return seal_state_file(io::serialize_safetensors(std::span(tensors).first(known), metadata),
                           version);
  }

  static Forgery with(const std::string& key, const std::string& value) {
    Forgery forgery;
    forgery.metadata[key] = value;
    return forgery;
  }

  static Forgery with_calls(std::vector<std::int64_t> calls) {
    Forgery forgery;
    forgery.calls_shape[0] = static_cast<std::int64_t>(calls.size() / 4);
    forgery.calls = std::move(calls);
    return forgery;
  }
};

void check_refused(const Buffer& bytes, const std::string& why) {
  CHECK_THROWS_MATCHES(parse_state_file(bytes), FileError, MessageMatches(ContainsSubstring(why)));
}

}  // namespace

TEST_CASE("a state file gives back what was put in", "[state_file]") {
  const StateFile file = example();
  const Buffer bytes = serialize_state_file(file);
  const StateFile again = parse_state_file(bytes);
  CHECK(again.model == file.model);
  CHECK(again.piece == file.piece);
  CHECK(again.policy == file.policy);
  CHECK(again.end_to_end == file.end_to_end);
  CHECK(again.journal_bytes == file.journal_bytes);
  CHECK(again.limited_writes == file.limited_writes);
  CHECK(again.base_limited_writes == file.base_limited_writes);
  CHECK(again.log == file.log);
  CHECK((again.marks == file.marks));
  CHECK((again.checkpoints == file.checkpoints));
  REQUIRE(again.tensors.size() == file.tensors.size());
  for (const io::TensorData& tensor : file.tensors) {
    const auto same = [&](const io::TensorData& other) {
      return other.name == tensor.name && other.type == tensor.type &&
             other.shape == tensor.shape && std::ranges::equal(other.bytes, tensor.bytes);
    };
    CHECK(std::ranges::count_if(again.tensors, same) == 1);
  }
  CHECK(std::ranges::equal(serialize_state_file(again), bytes));
}

TEST_CASE("what is written piece by piece is what is serialized", "[state_file]") {
  const fastweights::test::TemporaryFolder folder;
  const auto path = folder.path() / "state";
  fastweights::write_state_file(path, example());
  const io::MappedFile file(path);
  CHECK(std::ranges::equal(file.bytes(), serialize_state_file(example())));
  // XXH3, 128 bits: of this content since the first version of the format.
  const Buffer sealed =
      seal_state_file(std::as_bytes(std::span(std::string_view("fastweights"))), 2);
  std::vector<int> digest;
  for (const std::byte each : std::span(sealed).last(16)) {
    digest.push_back(std::to_integer<int>(each));
  }
  CHECK(digest == std::vector<int>{0x75, 0xed, 0x24, 0x95, 0x86, 0xbb, 0x95, 0x2b, 0x25, 0xf9, 0x72,
                                   0x5d, 0xc1, 0x75, 0xea, 0x6a});
}

TEST_CASE("every truncation and every flipped byte is refused", "[state_file]") {
  const Buffer bytes = serialize_state_file(example());
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    INFO("cut to " << size);
    REQUIRE_THROWS_AS(parse_state_file(std::span(bytes).first(size)), FileError);
  }
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (const int flip : {0x01, 0x80, 0xFF}) {
      Buffer altered = bytes;
      altered[i] ^= static_cast<std::byte>(flip);
      INFO("byte " << i << " xor " << flip);
      REQUIRE_THROWS_AS(parse_state_file(altered), FileError);
    }
  }
}

TEST_CASE("a refusal says what is wrong", "[state_file]") {
  const Buffer bytes = serialize_state_file(example());
  check_refused({}, "empty");
  check_refused(Buffer(100, std::byte{'x'}), "no fastweights state file");
  check_refused(Buffer(bytes.begin(), bytes.begin() + 5), "cut short");
  check_refused(Buffer(bytes.begin(), bytes.begin() + 30), "cut short");
  check_refused(Buffer(bytes.begin(), bytes.end() - 1), "cut short");

  Buffer altered = bytes;
  altered[100] ^= std::byte{1};
  check_refused(altered, "altered: its checksum");
  Buffer longer = bytes;
  longer.push_back(std::byte{0});
  check_refused(longer, "altered");

  Buffer newer = bytes;
  newer[8] = std::byte{3};
  check_refused(newer, "altered");  // damage, since a newer version would be sealed too
  check_refused(seal_state_file({}, 3), "newer version: format 3");
  check_refused(seal_state_file({}, 0), "no format 0");
}

TEST_CASE("forged metadata are refused", "[state_file]") {
  CHECK_NOTHROW(parse_state_file(Forgery().file()));
  CHECK_NOTHROW(parse_state_file(Forgery::with("piece", "1024").file()));
  check_refused(Forgery::with("piece", "0").file(), "piece");
  check_refused(Forgery::with("piece", "-1").file(), "piece");
  check_refused(Forgery::with("piece", "5.5").file(), "piece");
  check_refused(Forgery::with("piece", "").file(), "piece");
  check_refused(Forgery::with("piece", " 5").file(), "piece");
  check_refused(Forgery::with("piece", "9223372036854775808").file(), "piece");
  check_refused(Forgery::with("seed", "18446744073709551616").file(), "seed");
  check_refused(Forgery::with("model", "0123456789ABCDEF0123456789abcdef").file(), "model");
  check_refused(Forgery::with("model", "0123").file(), "model");
  check_refused(Forgery::with("vocabulary_size", "0").file(), "vocabulary_size");
  check_refused(Forgery::with("vocabulary_size", "257").file(), "log.tokens");  // two bytes each
  check_refused(Forgery::with("vocabulary_size", "200").file(), "must be below 200");
  check_refused(Forgery::with("journal_bytes", "-1").file(), "journal_bytes");
  check_refused(Forgery::with("limited_writes", "x").file(), "limited_writes");
  check_refused(Forgery::with("base_read", "-1").file(), "base_read");
  check_refused(Forgery::with("base_draws", "1").file(), "base_draws");
  Forgery committed;
  committed.metadata["base_read"] = "9223372036854775807";
  check_refused(committed.file(), "positions are too large");
  committed.metadata["base_written"] = "1";
  check_refused(committed.file(), "base_written");
  for (const char* key :
       {"model", "vocabulary_size", "piece", "journal_bytes", "limited_writes", "seed", "base_read",
        "base_written", "base_draws", "base_limited_writes"}) {
    Forgery forgery;
    forgery.metadata.erase(key);
    check_refused(forgery.file(), std::string("`").append(key).append("` is missing"));
  }
}

TEST_CASE("a forged log is refused", "[state_file]") {
  CHECK_NOTHROW(parse_state_file(Forgery::with_calls({0, 3, 0, 0}).file()));
  check_refused(Forgery::with_calls({0, 2, 0, 0}).file(), "do not cover");
  check_refused(Forgery::with_calls({0, 4, 0, 0}).file(), "malformed");
  check_refused(Forgery::with_calls({}).file(), "do not cover");
  check_refused(Forgery::with_calls({0, -1, 0, 0, 0, 4, 0, 0}).file(), "impossible");
  check_refused(Forgery::with_calls({0, 0, 0, 0, 0, 3, 0, 0}).file(), "malformed");
  check_refused(Forgery::with_calls({2, 3, 0, 0}).file(), "impossible");
  check_refused(Forgery::with_calls({0, 3, 2, 0}).file(), "impossible");
  check_refused(Forgery::with_calls({0, 3, 1, 5}).file(), "seed");
  Forgery flat;
  flat.calls_shape = {8};
  check_refused(flat.file(), "log.calls");
  Forgery wide;
  wide.tokens_shape = {1, 3};
  check_refused(wide.file(), "log.tokens");
}

TEST_CASE("forged strengths, marks and checkpoints are refused", "[state_file]") {
  const auto strengths = [](std::vector<std::int64_t> rows) {
    Forgery forgery;
    forgery.strengths = std::move(rows);
    return forgery.file();
  };
  const std::int64_t half = 0x3F000000;  // 0.5
  CHECK_NOTHROW(parse_state_file(strengths({0, 2, half})));
  check_refused(strengths({0, 4, half}), "no span in order");
  check_refused(strengths({2, 3, half, 0, 1, half}), "no span in order");
  check_refused(strengths({-1, 2, half}), "impossible");
  check_refused(strengths({0, 2, -1}), "impossible");
  check_refused(strengths({0, 2, 0x7FC00000}), "must be in [0, 2]");  // NaN
  check_refused(strengths({0, 2, 0x40200000}), "must be in [0, 2]");  // 2.5
  check_refused(strengths({0, 2, 0x3F800000}), "shortest form");      // 1

  const auto marks = [](std::vector<std::int64_t> rows) {
    Forgery forgery;
    forgery.marks = std::move(rows);
    return forgery.file();
  };
  CHECK_NOTHROW(parse_state_file(marks({-5, 3, 0, 6, 100, 1})));
  check_refused(marks({5, 4, 0}), "position of a mark");
  check_refused(marks({5, 3, 0, 6, 2, 0}), "position of a mark");
  check_refused(marks({5, 1, 0, 5, 2, 0}), "twice");
  check_refused(marks({5, 1, 3}), "impossible");
  check_refused(marks({5, -1, 0}), "impossible");

  const auto checkpoints = [](std::vector<std::int64_t> rows) {
    Forgery forgery;
    forgery.checkpoints = std::move(rows);
    return forgery.file();
  };
  CHECK_NOTHROW(parse_state_file(checkpoints({0, 0, 2, 5, 3, 5})));
  check_refused(checkpoints({1, 0}), "at boundaries");
  check_refused(checkpoints({4, 0}), "at boundaries");
  check_refused(checkpoints({2, 0, 2, 0}), "in order");
  check_refused(checkpoints({-2, 0}), "impossible");
  check_refused(checkpoints({2, -1}), "impossible");
}

TEST_CASE("forged options are refused", "[state_file]") {
  Forgery whole;
  whole.policy = {{1.0, 0.0, 2.0, 0.0}, {0.0, 0.0, 0.0, 0.0}};
  whole.end_to_end = {{1.0, 32.0, 1.0}};
  const Buffer bytes = whole.file();
  const StateFile file = parse_state_file(bytes);
  CHECK(file.policy.head_norm_cap == 2.0);
  CHECK(file.end_to_end == fastweights::EndToEndOptions{1.0, 32, 1.0});

  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<std::vector<std::vector<double>>> policies = {
      {{1.0, 0.0, 0.0, 0.0}},
      {{nan, 0.0, 0.0, 0.0}, {0.0, 0.0, 0.0, 0.0}},
      {{3.0, 0.0, 0.0, 0.0}, {0.0, 0.0, 0.0, 0.0}},
      {{1.0, 0.0, 0.0, 1.0}, {5.0, 1.0, 0.0, 1.0}}};
  for (const auto& rows : policies) {
    Forgery forged;
    forged.policy = rows;
    check_refused(forged.file(), "malformed");
  }
  const std::vector<std::vector<std::vector<double>>> options = {
      {{1.0, 32.0, 1.0}, {1.0, 32.0, 1.0}},
      {{nan, 32.0, 1.0}},
      {{1.0, nan, 1.0}},
      {{1.0, 1e300, 1.0}},
      {{1.0, 1.5, 1.0}},
      {{1.0, 0.0, 1.0}},
      {{1.0, 32.0, -1.0}}};
  for (const auto& rows : options) {
    Forgery forged;
    forged.end_to_end = rows;
    check_refused(forged.file(), "malformed");
  }
}

TEST_CASE("files of version 1 are still read", "[state_file]") {
  Forgery old;
  old.version = 1;
  old.metadata = {{"model", "0123456789abcdef0123456789abcdef"},
                  {"vocabulary_size", "256"},
                  {"piece", "512"},
                  {"seed", "1"}};
  const Buffer bytes = old.file();
  const StateFile file = parse_state_file(bytes);
  CHECK(file.log.end() == 3);
  CHECK(file.log.base().generator == fastweights::Generator{1, 0});
  CHECK(file.journal_bytes == 64 << 20);
  CHECK(file.marks.empty());
  CHECK(file.checkpoints.empty());
  const Buffer now = serialize_state_file(file);
  CHECK(parse_state_file(now).log == file.log);
}

TEST_CASE("content that is no safetensors file is refused", "[state_file]") {
  check_refused(seal_state_file({}), "malformed");
  const Buffer noise(64, std::byte{0xFF});
  check_refused(seal_state_file(noise), "malformed");
}

TEST_CASE("a tensor whose bytes do not fit its shape is not written", "[state_file]") {
  StateFile file = example();
  file.tensors[0].shape = {7};
  CHECK_THROWS_AS(serialize_state_file(file), fastweights::ShapeError);
  file.tensors[0] = {"log.calls", io::ScalarType::F32, {2, 3}, std::as_bytes(std::span(kValues))};
  CHECK_THROWS_AS(serialize_state_file(file), fastweights::Error);
}
