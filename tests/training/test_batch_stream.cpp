#include "training/batch_stream.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <string>
#include <vector>

#include "fastweights/core/error.hpp"

using training::BatchStream;
using training::kIgnored;
using training::Segment;
using training::StreamOptions;
using training::Work;

namespace {

std::string random_bytes(size_t size, uint64_t seed) {
  training::Random random(seed);
  std::string bytes(size, '\0');
  // No line ends: places are then exactly those that were drawn.
  for (char& byte : bytes) byte = static_cast<char>(32 + random.below(200));
  return bytes;
}

std::vector<Work> three_works() {
  return {{"a", random_bytes(1000, 1)}, {"b", random_bytes(777, 2)}, {"c", random_bytes(64, 3)}};
}

std::string row_text(const at::Tensor& tensor, int64_t row) {
  std::string text;
  for (int64_t t = 0; t < tensor.size(1); ++t) {
    const auto value = tensor[row][t].item<int64_t>();
    if (value != kIgnored) text.push_back(static_cast<char>(value));
  }
  return text;
}

bool is_fresh(const Segment& segment, int64_t row) { return segment.fresh[row].item<bool>(); }

// The bytes of row 0 until it starts its next work, its first input included.
std::string first_work(BatchStream& stream) {
  Segment segment = stream.next();
  std::string text(1, static_cast<char>(segment.inputs[0][0].item<int64_t>()));
  do {
    text += row_text(segment.targets, 0);
    segment = stream.next();
  } while (!is_fresh(segment, 0));
  return text;
}

}  // namespace

TEST_CASE("a row reads works from front to back", "[batch_stream]") {
  const auto works = three_works();
  BatchStream stream(works, {.rows = 2, .segment = 50, .seed = 7});
  Segment before = stream.next();
  CHECK(before.fresh.all().item<bool>());
  std::vector<std::string> read(2);
  for (int i = 0; i < 200; ++i) {
    const Segment segment = stream.next();
    for (int64_t row = 0; row < 2; ++row) {
      if (is_fresh(segment, row)) {
        read[row] = std::string(1, static_cast<char>(segment.inputs[row][0].item<int64_t>()));
      } else {
        // What is read next is what had to be predicted last.
        CHECK(segment.inputs[row][0].item<int64_t>() == before.targets[row][49].item<int64_t>());
      }
      read[row] += row_text(segment.targets, row);
      const bool known = std::any_of(works.begin(), works.end(), [&](const Work& work) {
        return read[row].size() < 2 || work.bytes.find(read[row]) != std::string::npos;
      });
      CHECK(known);
    }
    before = segment;
  }
}

TEST_CASE("the second work of a row starts at its front, and every work is dealt",
          "[batch_stream]") {
  const auto works = three_works();
  BatchStream stream(works, {.rows = 1, .segment = 100, .seed = 3});
  first_work(stream);
  std::vector<std::string> starts;
  for (int i = 0; i < 60; ++i) {
    const Segment segment = stream.next();
    if (is_fresh(segment, 0)) starts.push_back(row_text(segment.targets, 0).substr(0, 20));
  }
  for (const Work& work : works) {
    CHECK(std::count(starts.begin(), starts.end(), work.bytes.substr(1, 20)) >= 2);
  }
}

TEST_CASE("the end of a work is padded and not counted", "[batch_stream]") {
  const std::vector<Work> works = {{"short", "abcdefgh"}};
  BatchStream stream(works, {.rows = 1, .segment = 16, .seed = 1});
  stream.next();
  const Segment segment = stream.next();
  CHECK(is_fresh(segment, 0));
  CHECK(segment.bytes == 7);
  CHECK(row_text(segment.targets, 0) == "bcdefgh");
  CHECK(segment.targets[0][7].item<int64_t>() == kIgnored);
}

TEST_CASE("resets happen with their probability", "[batch_stream]") {
  const std::vector<Work> works = {{"long", random_bytes(1000000, 5)}};
  BatchStream never(works, {.rows = 4, .segment = 32, .reset_probability = 0.0, .seed = 1});
  BatchStream often(works, {.rows = 4, .segment = 32, .reset_probability = 0.5, .seed = 1});
  never.next();
  often.next();
  int64_t resets = 0;
  for (int i = 0; i < 100; ++i) {
    CHECK(never.next().fresh.sum().item<int64_t>() == 0);
    resets += often.next().fresh.sum().item<int64_t>();
  }
  CHECK(resets > 150);
  CHECK(resets < 250);
}

TEST_CASE("planted repeats copy what the row read and lose nothing", "[batch_stream]") {
  const std::vector<Work> works = {{"long", random_bytes(60000, 9)}};
  BatchStream plain(works, {.rows = 1, .segment = 1024, .seed = 2});
  BatchStream planted(works, {.rows = 1, .segment = 1024, .repeat_probability = 1.0, .seed = 2});
  const std::string expected = first_work(plain);
  const std::string text = first_work(planted);
  CHECK(works[0].bytes.find(expected) != std::string::npos);
  CHECK(text.size() > expected.size());

  // Taking out each passage that stood before leaves the work.
  std::string rest;
  int repeats = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t earlier = text.substr(0, i).find(text.substr(i, 32));
    if (i + 32 > text.size() || earlier == std::string::npos) {
      rest.push_back(text[i++]);
      continue;
    }
    size_t length = 32;
    while (i + length < text.size() && earlier + length < i &&
           text[earlier + length] == text[i + length]) {
      ++length;
    }
    CHECK(length >= 64);
    CHECK(length <= 257);  // a byte more where chance has it
    CHECK(i - earlier >= 256);
    CHECK(i - earlier <= 16384);
    i += length;
    ++repeats;
  }
  CHECK(repeats > 10);
  CHECK(rest.size() + 64 >= expected.size());
}

TEST_CASE("a restored stream goes on exactly", "[batch_stream]") {
  const auto works = three_works();
  const StreamOptions options{3, 64, 0.2, 0.8, 11};
  BatchStream stream(works, options);
  for (int i = 0; i < 17; ++i) stream.next();
  BatchStream restored(works, {3, 64, 0.2, 0.8, 99});
  restored.restore(stream.save());
  for (int i = 0; i < 40; ++i) {
    const Segment a = stream.next();
    const Segment b = restored.next();
    CHECK(a.inputs.equal(b.inputs));
    CHECK(a.targets.equal(b.targets));
    CHECK(a.fresh.equal(b.fresh));
  }
}

TEST_CASE("a stream refuses a state that does not fit", "[batch_stream]") {
  const auto works = three_works();
  BatchStream stream(works, {.rows = 2, .segment = 64});
  auto tensors = BatchStream(works, {.rows = 3, .segment = 64}).save();
  CHECK_THROWS_AS(stream.restore(tensors), fastweights::StateMismatch);
  tensors = stream.save();
  tensors["stream.places"][0][0] = 3;  // there are works 0, 1 and 2
  CHECK_THROWS_AS(stream.restore(tensors), fastweights::StateMismatch);
  tensors = stream.save();
  tensors.erase("stream.random");
  CHECK_THROWS_AS(stream.restore(tensors), fastweights::StateMismatch);
}
