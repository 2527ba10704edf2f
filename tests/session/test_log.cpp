#include <malloc.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/session/log.hpp"
#include "fastweights/session/mark.hpp"

using fastweights::CallKind;
using fastweights::Error;
using fastweights::LogBase;
using fastweights::LogCall;
using fastweights::LogStep;
using fastweights::SessionLog;
using fastweights::StrengthSpan;
using Tokens = std::vector<std::int64_t>;

TEST_CASE("a log keeps tokens and the boundaries of calls", "[log]") {
  SessionLog log(256);
  CHECK(log.size() == 0);
  log.start_call(CallKind::kRead, Tokens{1, 2, 255});
  log.extend_call(Tokens{0});
  log.start_call(CallKind::kWritten, Tokens{7}, 42);

  CHECK(log.size() == 5);
  CHECK(log.tokens(0, 5) == Tokens{1, 2, 255, 0, 7});
  CHECK(log.tokens(2, 4) == Tokens{255, 0});
  CHECK(log.tokens(5, 5).empty());
  REQUIRE(log.calls().size() == 2);
  CHECK(log.calls()[0] == LogCall{CallKind::kRead, 4, {}});
  CHECK(log.calls()[1] == LogCall{CallKind::kWritten, 1, 42});
}

TEST_CASE("a token takes as few bytes as the vocabulary allows", "[log]") {
  const auto width = [](std::int64_t vocabulary) {
    return SessionLog(vocabulary).bytes_per_token();
  };
  CHECK(width(1) == 1);
  CHECK(width(256) == 1);
  CHECK(width(257) == 2);
  CHECK(width(65536) == 2);
  CHECK(width(151936) == 3);
  CHECK(width(std::int64_t{1} << 32) == 4);

  SessionLog log(151936);
  const Tokens tokens{0, 151935, 256, 65536};
  log.start_call(CallKind::kRead, tokens);
  CHECK(log.tokens(0, 4) == tokens);
  CHECK(log.packed().size() == 12);
}

TEST_CASE("a log comes back from its stored form", "[log]") {
  SessionLog log(1000);
  log.start_call(CallKind::kRead, Tokens{999, 0, 512});
  log.start_call(CallKind::kWritten, Tokens{3});
  CHECK(SessionLog::from_packed(1000, log.packed(), log.calls()) == log);
  log.set_strength(1, 3, 0.5F);
  const std::vector<StrengthSpan> strengths(log.strengths().begin(), log.strengths().end());
  CHECK(SessionLog::from_packed(1000, log.packed(), log.calls(), strengths) == log);
  CHECK_FALSE(SessionLog::from_packed(1000, log.packed(), log.calls()) == log);
  log.commit();
  CHECK(SessionLog::from_packed(1000, {}, {}, {}, log.base()) == log);
}

TEST_CASE("a stored log whose parts do not agree is refused", "[log]") {
  SessionLog log(1000);
  log.start_call(CallKind::kRead, Tokens{999, 0, 512});
  const auto parse = [&](std::int64_t vocabulary, std::size_t bytes, std::vector<LogCall> calls) {
    auto packed = log.packed();
    packed.resize(bytes);
    return SessionLog::from_packed(vocabulary, packed, calls);
  };
  CHECK_NOTHROW(parse(1000, 6, {{CallKind::kRead, 3, {}}}));
  CHECK_NOTHROW(parse(1000, 0, {}));
  CHECK_THROWS_AS(parse(999, 6, {{CallKind::kRead, 3, {}}}), Error);   // token too large
  CHECK_THROWS_AS(parse(1000, 5, {{CallKind::kRead, 3, {}}}), Error);  // half a token
  CHECK_THROWS_AS(parse(1000, 6, {{CallKind::kRead, 2, {}}}), Error);  // too few
  CHECK_THROWS_AS(parse(1000, 6, {{CallKind::kRead, 4, {}}}), Error);  // too many
  CHECK_THROWS_AS(parse(1000, 6, {{CallKind::kRead, 3, 1}}), Error);   // seed on a read
  CHECK_THROWS_AS(parse(1000, 6, {{CallKind::kRead, -1, {}}, {CallKind::kRead, 4, {}}}), Error);
  CHECK_THROWS_AS(parse(1000, 6, {{CallKind::kRead, 3, {}}, {CallKind::kRead, 0, {}}}), Error);
  CHECK_THROWS_AS(parse(1000, 6, {{static_cast<CallKind>(2), 3, {}}}), Error);
}

TEST_CASE("stored strengths and bases that do not agree are refused", "[log]") {
  SessionLog log(256);
  log.start_call(CallKind::kRead, Tokens{1, 2, 3, 4, 5});
  const auto with = [&](std::vector<StrengthSpan> strengths, const LogBase& base = {}) {
    return SessionLog::from_packed(256, log.packed(), log.calls(), std::move(strengths), base);
  };
  CHECK_NOTHROW(with({{0, 2, 0.0F}, {2, 3, 2.0F}, {4, 5, 0.5F}}));
  CHECK_THROWS_AS(with({{0, 2, 2.5F}}), Error);
  CHECK_THROWS_AS(with({{0, 2, -0.1F}}), Error);
  CHECK_THROWS_AS(with({{0, 2, std::numeric_limits<float>::quiet_NaN()}}), Error);
  CHECK_THROWS_AS(with({{0, 2, 1.0F}}), Error);                  // says nothing
  CHECK_THROWS_AS(with({{2, 2, 0.5F}}), Error);                  // empty
  CHECK_THROWS_AS(with({{0, 6, 0.5F}}), Error);                  // too long
  CHECK_THROWS_AS(with({{-1, 2, 0.5F}}), Error);                 // too early
  CHECK_THROWS_AS(with({{2, 3, 0.5F}, {0, 1, 0.5F}}), Error);    // out of order
  CHECK_THROWS_AS(with({{0, 2, 0.5F}, {1, 3, 0.5F}}), Error);    // overlapping
  CHECK_THROWS_AS(with({{0, 2, 0.5F}, {2, 3, 0.5F}}), Error);    // could be one
  CHECK_THROWS_AS(with({{0, 2, 0.5F}}, {10, 4, 6, {}}), Error);  // before what was committed
  CHECK_NOTHROW(with({{10, 12, 0.5F}}, {10, 4, 6, {}}));
  CHECK_THROWS_AS(with({}, {10, 4, 5, {}}), Error);
  CHECK_THROWS_AS(with({}, {10, 11, -1, {}}), Error);
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  CHECK_THROWS_AS(with({}, {most, most, 0, {}}), Error);
}

// Pieces of three. R: read 0..7, W: written 7..15, R: read 15..17.
SessionLog example() {
  SessionLog log(256);
  log.start_call(CallKind::kRead, Tokens{0, 1, 2, 3, 4, 5, 6});
  log.start_call(CallKind::kWritten, Tokens{7, 8, 9, 10, 11, 12, 13, 14}, 5);
  log.start_call(CallKind::kRead, Tokens{15, 16});
  return log;
}

std::vector<LogStep> steps(const SessionLog& log) {
  std::vector<LogStep> out;
  for (std::int64_t at = log.start(); at < log.end(); at = out.back().end) {
    CHECK(log.is_boundary(at, 3));
    out.push_back(log.step_at(at, 3));
    for (std::int64_t inside = at + 1; inside < out.back().end; ++inside) {
      CHECK_FALSE(log.is_boundary(inside, 3));
    }
  }
  CHECK(log.is_boundary(log.end(), 3));
  return out;
}

TEST_CASE("a log says in which steps it is processed", "[log]") {
  SessionLog log = example();
  using Steps = std::vector<LogStep>;
  const Steps first{{0, 3, false}, {3, 6, false}, {6, 7, false}};
  const auto join = [](Steps a, const Steps& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  };
  const Steps plain = join(first, {{7, 8, true},
                                   {8, 9, true},
                                   {9, 10, true},
                                   {10, 11, true},
                                   {11, 12, true},
                                   {12, 13, true},
                                   {13, 14, true},
                                   {14, 15, true},
                                   {15, 17, false}});
  CHECK((steps(log) == plain));
  log.set_strength(2, 5, 0.0F);  // a read call keeps its pieces
  CHECK((steps(log) == plain));
  log.set_strength(8, 12, 0.5F);  // a run of written tokens has pieces of its own
  log.set_strength(12, 13, 2.0F);
  CHECK((steps(log) == join(first, {{7, 8, true},
                                    {8, 11, false},
                                    {11, 13, false},
                                    {13, 14, true},
                                    {14, 15, true},
                                    {15, 17, false}})));
  log.set_strength(13, 17, 0.5F);  // which ends with its call
  CHECK((steps(log) ==
         join(first,
              {{7, 8, true}, {8, 11, false}, {11, 14, false}, {14, 15, false}, {15, 17, false}})));
  log.set_strength(0, 17, 1.0F);
  CHECK(log == example());
}

TEST_CASE("setting a strength tells what it changed first", "[log]") {
  SessionLog log = example();
  CHECK(log.set_strength(3, 6, 1.0F) == 6);
  CHECK(log.set_strength(3, 6, 0.5F) == 3);
  CHECK(log.set_strength(3, 9, 0.5F) == 6);
  CHECK(log.set_strength(4, 8, 0.5F) == 8);
  CHECK(log.strengths(0, 3).empty());
  CHECK(log.strengths(2, 5) == std::vector<float>{1.0F, 0.5F, 0.5F});
  CHECK(log.strengths(8, 10) == std::vector<float>{0.5F, 1.0F});
  CHECK(log.set_strength(5, 7, 0.0F) == 5);
  CHECK(log.strengths().size() == 3);
  CHECK(log.set_strength(0, 17, 1.0F) == 3);
  CHECK(log.strengths().empty());
  CHECK_THROWS_AS(log.set_strength(0, 1, 2.1F), Error);
  CHECK_THROWS_AS(log.set_strength(0, 18, 1.5F), Error);
}

TEST_CASE("a log is cut, inside a call too", "[log]") {
  SessionLog log = example();
  log.set_strength(8, 12, 0.5F);
  log.truncate(10);
  CHECK(log.end() == 10);
  CHECK(
      (log.calls() == std::vector<LogCall>{{CallKind::kRead, 7, {}}, {CallKind::kWritten, 3, 5}}));
  CHECK(log.strengths(7, 10) == std::vector<float>{1.0F, 0.5F, 0.5F});
  CHECK(log.generator() == fastweights::Generator{5, 3});
  log.truncate(7);
  CHECK((log.calls() == std::vector<LogCall>{{CallKind::kRead, 7, {}}}));
  CHECK(log.strengths().empty());
  log.truncate(0);
  CHECK(log == SessionLog(256));
  CHECK_THROWS_AS(log.truncate(1), Error);
  CHECK_THROWS_AS(log.truncate(-1), Error);
}

TEST_CASE("tokens are taken out of their calls", "[log]") {
  SessionLog log = example();
  log.set_strength(8, 12, 0.5F);
  log.set_strength(15, 16, 2.0F);
  SessionLog across = log;
  across.erase(5, 10);
  CHECK(across.tokens(0, 12) == Tokens{0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16});
  CHECK((across.calls() == std::vector<LogCall>{{CallKind::kRead, 5, {}},
                                                {CallKind::kWritten, 5, 5},
                                                {CallKind::kRead, 2, {}}}));
  CHECK(across.strengths(5, 12) == std::vector<float>{0.5F, 0.5F, 1.0F, 1.0F, 1.0F, 2.0F, 1.0F});
  CHECK(across.read() == 7);
  CHECK(across.written() == 5);

  SessionLog inside = log;
  inside.erase(9, 11);
  CHECK(inside.calls()[1].tokens == 6);
  CHECK(inside.strengths(7, 11) == std::vector<float>{1.0F, 0.5F, 0.5F, 1.0F});

  SessionLog whole = log;
  whole.erase(7, 15);
  CHECK(
      (whole.calls() == std::vector<LogCall>{{CallKind::kRead, 7, {}}, {CallKind::kRead, 2, {}}}));
  CHECK(whole.generator() == fastweights::Generator{});
  whole.erase(0, 9);
  CHECK(whole == SessionLog(256));
  CHECK_THROWS_AS(log.erase(3, 18), Error);
  CHECK_THROWS_AS(log.erase(4, 3), Error);
}

TEST_CASE("what is committed is gone, and counted", "[log]") {
  SessionLog log = example();
  log.commit();
  CHECK(log.size() == 0);
  CHECK(log.start() == 17);
  CHECK(log.base() == LogBase{17, 9, 8, {5, 8}});
  log.start_call(CallKind::kWritten, Tokens{1, 2});
  CHECK(log.tokens(17, 19) == Tokens{1, 2});
  CHECK(log.generator() == fastweights::Generator{5, 10});
  CHECK(log.written() == 10);
  CHECK_THROWS_AS(log.tokens(16, 18), Error);
  CHECK_THROWS_AS(log.truncate(16), Error);
}

TEST_CASE("a long log is what was put into it, whatever is cut and added", "[log]") {
  SessionLog log(70000);  // three bytes a token: blocks end inside tokens
  Tokens expected;
  std::uint32_t x = 1;
  const auto random = [&](std::uint32_t below) {
    x = x * 1664525U + 1013904223U;
    return static_cast<std::int64_t>((std::uint64_t{x} * below) >> 32);
  };
  std::vector<std::pair<SessionLog, Tokens>> copies;
  for (int round = 0; round < 60; ++round) {
    Tokens added(static_cast<std::size_t>(1 + random(6000)));
    for (std::int64_t& token : added) token = random(70000);
    log.start_call(CallKind::kRead, added);
    expected.insert(expected.end(), added.begin(), added.end());
    if (round % 3 == 0) copies.emplace_back(log, expected);
    if (round % 4 == 1) {
      const std::int64_t end = log.end() - random(static_cast<std::uint32_t>(log.end()) / 2);
      log.truncate(end);
      expected.resize(static_cast<std::size_t>(end));
    }
    if (round % 4 == 3) {
      const std::int64_t begin = random(static_cast<std::uint32_t>(log.end()));
      const std::int64_t end = begin + random(static_cast<std::uint32_t>(log.end() - begin));
      log.erase(begin, end);
      expected.erase(expected.begin() + begin, expected.begin() + end);
    }
    REQUIRE(log.tokens(0, log.end()) == expected);
  }
  for (const auto& [copy, tokens] : copies) CHECK(copy.tokens(0, copy.end()) == tokens);
}

TEST_CASE("copies of a log cost what differs", "[log]") {
  SessionLog log(256);
  const Tokens page(4096, 7);
  for (int i = 0; i < 1000; ++i) log.start_call(CallKind::kRead, page);  // 4 MB, a thousand calls
  const auto allocated = [] { return mallinfo2().uordblks + mallinfo2().hblkhd; };
  const auto before = allocated();
  std::vector<SessionLog> copies(1000, log);
  CHECK(allocated() - before < 1000 * 400);  // the objects themselves
  for (SessionLog& copy : copies) copy.start_call(CallKind::kRead, Tokens{1, 2, 3});
  CHECK(allocated() - before < 1000 * 12000);  // a block and the lists of blocks, of 4 MB
  CHECK(copies[17].tokens(4096000, 4096003) == Tokens{1, 2, 3});
  CHECK(log.end() == 4096000);
}

TEST_CASE("marks move along and tell why they are not valid", "[log]") {
  using Catch::Matchers::ContainsSubstring;
  fastweights::MarkTable marks;
  const auto a = marks.add(3);
  const auto b = marks.add(10);
  const auto c = marks.add(20);
  fastweights::MarkTable fork = marks;
  marks.erase(5, 12);
  CHECK(marks.position(a) == 3);
  CHECK(marks.position(b) == 5);
  CHECK(marks.position(c) == 13);
  marks.truncate(5);
  CHECK(marks.position(b) == 5);
  CHECK_THROWS_WITH(marks.position(c), ContainsSubstring("rolled back to before it"));
  CHECK(fork.position(c) == 20);
  const auto d = fork.add(20);
  CHECK(d.id != c.id);
  CHECK_THROWS_WITH(marks.position(d), ContainsSubstring("none of this session's"));
  marks.commit();
  CHECK_THROWS_WITH(marks.position(a), ContainsSubstring("commit()"));
  CHECK_THROWS_WITH(marks.position(c), ContainsSubstring("rolled back"));
  fork.commit();
  for (int i = 0; i < 6000; ++i) fork.add(i);
  fork.commit();
  CHECK(fork.entries().size() == 4096);
}

TEST_CASE("a log refuses what cannot be in it and stays as it was", "[log]") {
  SessionLog log(10);
  CHECK_THROWS_AS(log.extend_call(Tokens{1}), Error);
  CHECK_THROWS_AS(log.start_call(CallKind::kRead, Tokens{}), Error);
  CHECK_THROWS_AS(log.start_call(CallKind::kRead, Tokens{1, 10}), Error);
  CHECK_THROWS_AS(log.start_call(CallKind::kRead, Tokens{-1}), Error);
  CHECK(log == SessionLog(10));
  CHECK_THROWS_AS(log.tokens(0, 1), Error);
  CHECK_THROWS_AS(log.tokens(-1, 0), Error);
  CHECK_THROWS_AS(SessionLog(0), Error);
  CHECK_THROWS_AS(SessionLog((std::int64_t{1} << 32) + 1), Error);
}
