#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/session/log.hpp"

using fastweights::CallKind;
using fastweights::Error;
using fastweights::LogCall;
using fastweights::SessionLog;
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
  const std::vector<LogCall> calls(log.calls().begin(), log.calls().end());
  CHECK(SessionLog::from_packed(1000, log.packed(), calls) == log);
}

TEST_CASE("a stored log whose parts do not agree is refused", "[log]") {
  SessionLog log(1000);
  log.start_call(CallKind::kRead, Tokens{999, 0, 512});
  const auto parse = [&](std::int64_t vocabulary, std::size_t bytes, std::vector<LogCall> calls) {
    return SessionLog::from_packed(vocabulary, log.packed().first(bytes), std::move(calls));
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
