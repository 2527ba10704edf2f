#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <utility>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/session/generator.hpp"
#include "fastweights/session/longest_match.hpp"

using fastweights::Error;
using fastweights::Generator;
using fastweights::LongestMatch;
using fastweights::LongestMatchOptions;
using fastweights::TextMatch;

namespace {

/// What LongestMatch says it finds, by looking at every position.
class Oracle {
 public:
  explicit Oracle(const LongestMatchOptions& options) : options_(options) {}

  void append(std::int64_t token, bool kept) {
    text_.push_back(token);
    kept_.push_back(kept);
    if (std::ssize(text_) % LongestMatch::kPage == 0) {
      const auto pages = std::max<std::int64_t>(1, options_.bytes / (LongestMatch::kPage * 8));
      begin_ = std::max(begin_, std::ssize(text_) - pages * LongestMatch::kPage);
    }
    find();
  }

  const std::vector<TextMatch>& matches() const { return matches_; }

 private:
  std::int64_t agreement(std::int64_t position) const {
    std::int64_t length = 0;
    while (length < options_.longest && position - length > begin_ &&
           text_[static_cast<std::size_t>(position - 1 - length)] ==
               text_[text_.size() - 1 - static_cast<std::size_t>(length)]) {
      ++length;
    }
    return length;
  }

  void offer(std::int64_t position) {
    if (position < begin_ || position >= std::ssize(text_)) return;
    const TextMatch match{position, agreement(position)};
    if (match.length < options_.shortest || !kept_[static_cast<std::size_t>(position)]) return;
    if (std::ssize(matches_) > options_.candidates) return;
    if (!matches_.empty() && matches_[0].position == position) return;
    matches_.push_back(match);
  }

  void find() {
    std::int64_t next = -1;
    std::int64_t longest = 0;
    for (const TextMatch& match : matches_) {
      if (match.length > longest) next = match.position + 1;
      longest = std::max(longest, match.length);
    }
    matches_.clear();
    offer(next);
    for (std::int64_t position = std::ssize(text_) - 1; position >= begin_; --position) {
      offer(position);
    }
  }

  LongestMatchOptions options_;
  std::vector<std::int64_t> text_;
  std::vector<bool> kept_;
  std::int64_t begin_ = 0;
  std::vector<TextMatch> matches_;
};

/// A text that says again, in pieces, what it said before.
std::vector<std::int64_t> repeating_text(std::int64_t size, std::int64_t vocabulary,
                                         std::uint64_t seed) {
  Generator generator{.seed = seed};
  const auto below = [&](std::int64_t limit) {
    return static_cast<std::int64_t>(generator.uniform() * static_cast<double>(limit));
  };
  std::vector<std::int64_t> text;
  while (std::ssize(text) < size) {
    if (text.size() > 100 && below(2) == 0) {
      const auto from = below(std::ssize(text) - 60);
      for (std::int64_t i = 0; i < 60; ++i)
        text.push_back(text[static_cast<std::size_t>(from + i)]);
    } else {
      for (int i = 0; i < 30; ++i) text.push_back(below(vocabulary));
    }
  }
  text.resize(static_cast<std::size_t>(size));
  return text;
}

bool kept_at(std::int64_t position) { return position % 97 > 10; }

std::vector<TextMatch> found(const LongestMatch& match) {
  return {match.matches().begin(), match.matches().end()};
}

}  // namespace

TEST_CASE("what is found is what is there", "[longest_match]") {
  for (const std::int64_t vocabulary : {3, 256, 70000}) {
    for (const bool dropping : {false, true}) {
      CAPTURE(vocabulary, dropping);
      LongestMatchOptions options{.shortest = 4, .longest = 20, .candidates = 5};
      if (dropping) options.bytes = 3 * 8 * LongestMatch::kPage;
      if (dropping && vocabulary > 256) continue;  // the oracle counts one byte per token
      LongestMatch match(vocabulary, options);
      Oracle oracle(options);
      std::int64_t matches = 0;
      std::int64_t position = 0;
      for (const std::int64_t token : repeating_text(4500, vocabulary, 1)) {
        match.append(token, kept_at(position));
        oracle.append(token, kept_at(position));
        ++position;
        REQUIRE((found(match) == oracle.matches()));
        matches += std::ssize(match.matches());
      }
      CHECK(matches > 1000);
      CHECK((match.begin() > 0) == dropping);
      if (dropping) CHECK(match.bytes() <= options.bytes + 8 * LongestMatch::kPage);
    }
  }
}

TEST_CASE("a passage is followed to its end past more recent words of its own", "[longest_match]") {
  LongestMatch match(256, {.shortest = 4, .longest = 64, .candidates = 2});
  const auto say = [&](std::initializer_list<std::int64_t> tokens) {
    for (const std::int64_t token : tokens) match.append(token);
  };
  say({1, 2, 3, 4, 5, 10, 11, 12, 13, 99});
  for (int i = 0; i < 8; ++i) say({50 + i, 10, 11, 12, 13, 7});
  say({1, 2, 3, 4, 5, 10, 11, 12, 13});
  REQUIRE(match.matches().size() == 3);
  CHECK(match.token(match.matches()[0].position) == 99);
  CHECK(match.matches()[0].length == 9);
}

TEST_CASE("tokens that were not kept are context, and are not found", "[longest_match]") {
  LongestMatch match(256, {.shortest = 3});
  for (const std::int64_t token : {1, 2, 3, 4, 1, 2}) match.append(token, token != 4);
  match.append(3);
  CHECK(match.matches().empty());
  for (const std::int64_t token : {5, 1, 2, 3}) match.append(token);
  REQUIRE(match.matches().size() == 1);
  CHECK(match.token(match.matches()[0].position) == 5);
}

TEST_CASE("going back is never having gone on", "[longest_match]") {
  const LongestMatchOptions options{.shortest = 4, .candidates = 5};
  const auto text = repeating_text(9000, 4, 2);
  for (const std::int64_t place : {0, 1, 1023, 1024, 3000, 8191, 9000}) {
    CAPTURE(place);
    LongestMatch straight(4, options);
    LongestMatch back(4, options);
    std::vector<TextMatch> matches;
    for (std::int64_t i = 0; i < 9000; ++i) {
      if (i == place) matches = found(back);
      back.append(text[static_cast<std::size_t>(i)], kept_at(i));
      if (i < place) straight.append(text[static_cast<std::size_t>(i)], kept_at(i));
    }
    if (place == 9000) matches = found(back);
    back.truncate(place, 0, matches);
    CHECK(std::ranges::equal(back.skipped(), straight.skipped()));
    for (std::int64_t i = 0; i < 3000; ++i) {
      back.append(text[static_cast<std::size_t>(3 * i)], kept_at(i));
      straight.append(text[static_cast<std::size_t>(3 * i)], kept_at(i));
      REQUIRE((found(back) == found(straight)));
    }
  }
}

TEST_CASE("text that was dropped is missed by name", "[longest_match]") {
  LongestMatch match(4, {.bytes = 2 * 8 * LongestMatch::kPage});
  for (const std::int64_t token : repeating_text(5000, 4, 3)) match.append(token);
  CHECK(match.begin() == 2048);
  CHECK_THROWS_AS(match.truncate(1000, 0, {}), Error);
  CHECK_THROWS_AS(match.truncate(5001, 2048, {}), Error);
  CHECK(match.size() == 5000);
  CHECK_THROWS_AS(match.append(4), Error);
  CHECK_THROWS_AS(match.append(-1), Error);
}

TEST_CASE("options out of range are refused", "[longest_match]") {
  CHECK_THROWS_AS(LongestMatch(0, {}), Error);
  CHECK_THROWS_AS(LongestMatch((std::int64_t{1} << 31) + 1, {}), Error);
  CHECK_THROWS_AS(LongestMatch(256, {.shortest = 0}), Error);
  CHECK_THROWS_AS(LongestMatch(256, {.shortest = 6, .longest = 5}), Error);
  CHECK_THROWS_AS(LongestMatch(256, {.longest = 256}), Error);
  CHECK_THROWS_AS(LongestMatch(256, {.candidates = 65}), Error);
  CHECK_THROWS_AS(LongestMatch(256, {.bytes = -1}), Error);
}
