#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/session/session.hpp"
#include "fastweights/session/session_pool.hpp"
#include "guesses.hpp"
#include "small_session.hpp"

// Speculative decoding: whatever is guessed, text and session are those of plain writing.

namespace fastweights::test {
namespace {

using Catch::Matchers::ContainsSubstring;

struct Kind {
  std::string name;
  Model model;
  SessionOptions options = {};
};

Model model_with(bool gated, bool head, at::ScalarType type = at::kFloat) {
  auto config = small_config();
  config.memory_rule = gated ? "gated_delta_rule" : "delta_rule";
  config.fast_head = head;
  torch::manual_seed(5);
  auto model = std::make_shared<nn::LanguageModelImpl>(config);
  model->to(type);
  model->eval();
  for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  return model;
}

std::vector<Kind> kinds() {
  std::vector<Kind> all;
  for (const bool gated : {false, true}) {
    for (const bool head : {false, true}) {
      for (const bool store : {false, true}) {
        const std::string name = std::string(gated ? "gated" : "ungated") + (head ? ", head" : "") +
                                 (store ? ", store" : "");
        Kind kind{name, model_with(gated, head)};
        if (store) kind.options.store.emplace();
        all.push_back(kind);
      }
    }
  }
  all.push_back({"bf16", model_with(true, true, at::kBFloat16)});
  all.push_back({"not fused", model_with(true, true, at::kDouble)});
  Kind weak{"learned at half strength", model_with(true, true)};
  weak.options.policy.strength = 0.5F;
  all.push_back(weak);
  Kind strong{"learned more strongly", weak.model};
  strong.options.policy.strength = 1.5F;
  all.push_back(strong);
  Kind gate{"gated by surprise", weak.model};
  gate.options.policy.surprise = SurpriseGate{1.0, 6.0};
  all.push_back(gate);
  Kind cap{"capped", weak.model};
  cap.options.policy.memory_norm_cap = 2.0;
  all.push_back(cap);
  return all;
}

/// Guesses the text that is going to be written, `wrong_every` bytes a wrong one; counts its calls.
struct Oracle {
  std::string text;
  std::size_t wrong_every = 0;
  std::size_t told = 0;
  std::int64_t calls = 0;
  std::string heard = {};

  std::string operator()(std::string_view read, std::int64_t most) {
    heard += read;
    ++calls;
    told += read.size();
    std::string guess = text.substr(std::min(told, text.size()), static_cast<std::size_t>(most));
    for (std::size_t i = 0; i < guess.size(); ++i) {
      if (wrong_every != 0 && (told + i) % wrong_every == 0) guess[i] ^= 1;
    }
    return guess;
  }
};

Session started(const Kind& kind) {
  Session session(kind.model, kind.options);
  session.read("Round and round and round the rugged rock. Round and round and round the r");
  return session;
}

}  // namespace

TEST_CASE("what is guessed changes neither text nor session", "[ahead]") {
  const OneThread one_thread;
  for (const Kind& kind : kinds()) {
    for (const double temperature : {0.0, 0.8}) {
      INFO(kind.name << ", temperature " << temperature);
      WriteOptions options{.max_tokens = 150, .temperature = temperature, .seed = 7};
      Session plain = started(kind);
      const std::string text = plain.write(options);
      for (const std::int64_t ahead : {1, 5, 64}) {
        options.ahead = ahead;
        options.guess = {};
        Session looked_up = started(kind);
        CHECK(looked_up.write(options) == text);
        CHECK(same_bits(looked_up, plain));
        for (const std::size_t wrong_every : {0, 1, 3, 40}) {
          INFO(ahead << " ahead, wrong every " << wrong_every);
          Oracle oracle{text, wrong_every};
          options.guess = std::ref(oracle);
          Session guessed = started(kind);
          CHECK(guessed.write(options) == text);
          CHECK(same_bits(guessed, plain));
          CHECK(text.starts_with(oracle.heard));
        }
      }
    }
  }
}

TEST_CASE("tokens that were foreseen are read in one pass", "[ahead]") {
  const OneThread one_thread;
  const Kind kind{"", model_with(true, true)};
  Session plain = started(kind);
  WriteOptions options{.max_tokens = 120, .seed = 3};
  const std::string text = plain.write(options);
  const auto calls = [&](std::size_t wrong_every) {
    Oracle oracle{text, wrong_every};
    WriteOptions ahead = options;
    ahead.ahead = 9;
    ahead.guess = std::ref(oracle);
    started(kind).write(ahead);
    return oracle.calls;
  };
  CHECK(calls(0) <= 16);  // 12 passes of ten tokens, but for those that a checkpoint cuts
  CHECK(calls(1) <= 10);  // there are ever longer pauses
  CHECK(calls(3) > 30);
  CHECK(calls(3) < 60);
}

TEST_CASE("a text that was read ahead can be edited like any other", "[ahead]") {
  const OneThread one_thread;
  for (const bool store : {false, true}) {
    Kind kind{"", model_with(true, true)};
    if (store) kind.options.store.emplace();
    WriteOptions options{.max_tokens = 200, .temperature = 0.5, .seed = 2};
    Session plain = started(kind);
    Session ahead = started(kind);
    plain.write(options);
    options.ahead = 16;
    ahead.write(options);
    for (const std::int64_t to : {250, 193, 192, 131, 100}) {
      INFO("to " << to);
      plain.rollback(to);
      ahead.rollback(to);
      REQUIRE(same_bits(ahead, plain));
      const Session again = Session::from_log(kind.model, plain.log(), kind.options);
      CHECK(same_bits(again, plain));
      CHECK(ahead.fork().write(options) == plain.fork().write(options));
    }
  }
}

TEST_CASE("writing ahead stops where plain writing does", "[ahead]") {
  const OneThread one_thread;
  const Kind kind{"", model_with(true, true)};
  Session plain = started(kind);
  WriteOptions options{.max_tokens = 100, .seed = 4};
  const std::string text = plain.write(options);
  options.ahead = 8;
  options.guess = Oracle{text};
  SECTION("at a stop string") {
    options.stop = {text.substr(41, 3)};
    Session session = started(kind);
    const std::string written = session.write(options);
    CHECK(written == text.substr(0, text.find(options.stop[0]) + 3));
    Session expected = started(kind);
    expected.write({.max_tokens = std::ssize(written), .seed = 4});
    CHECK(same_bits(session, expected));
  }
  SECTION("when the callback says so") {
    std::string heard;
    options.on_token = [&](std::string_view bytes) {
      heard += bytes;
      return heard.size() < 33;
    };
    Session session = started(kind);
    CHECK(session.write(options) == text.substr(0, 33));
    CHECK(heard == text.substr(0, 33));
    CHECK(session.position() == started(kind).position() + 33);
  }
  SECTION("when the guessing throws") {
    std::int64_t calls = 0;
    options.guess = [&](std::string_view, std::int64_t most) -> std::string {
      if (++calls == 5) throw std::runtime_error("no more guesses");
      return std::string(static_cast<std::size_t>(most), text[0]);
    };
    Session session = started(kind);
    CHECK_THROWS_WITH(session.write(options), "no more guesses");
    const std::int64_t written = session.position() - started(kind).position();
    CHECK(written >= 5);
    Session expected = started(kind);
    expected.write({.max_tokens = written, .seed = 4});
    CHECK(same_bits(session, expected));
  }
}

TEST_CASE("more guesses than were asked for are not read", "[ahead]") {
  const OneThread one_thread;
  const Kind kind{"", model_with(true, true)};
  Session plain = started(kind);
  const std::string text = plain.write({.max_tokens = 40, .seed = 4});
  Session session = started(kind);
  WriteOptions options{.max_tokens = 40, .seed = 4, .ahead = 3};
  std::size_t told = 0;
  options.guess = [&](std::string_view read, std::int64_t) {
    told += read.size();
    return text.substr(told) + "and more";
  };
  CHECK(session.write(options) == text);
  CHECK(same_bits(session, plain));
}

TEST_CASE("what reading ahead refuses", "[ahead]") {
  const Kind kind{"", model_with(true, true)};
  Session session = started(kind);
  const Session before = session;
  for (const std::int64_t ahead : {-1, 65}) {
    CHECK_THROWS_WITH(session.write({.ahead = ahead}),
                      ContainsSubstring("ahead must be in [0, 64]"));
  }
  WriteOptions options;
  options.guess = [](std::string_view, std::int64_t) { return std::string(); };
  CHECK_THROWS_WITH(session.write(options), ContainsSubstring("no use where ahead is 0"));
  CHECK(same_bits(session, before));
  SessionPool pool(kind.model, {});
  pool.create("one");
  options.ahead = 4;
  CHECK_THROWS_WITH(pool.write("one", options), ContainsSubstring("lone sessions only"));
}

TEST_CASE("sessions of a pool may read ahead side by side", "[ahead]") {
  const OneThread one_thread;
  const Kind kind{"", model_with(true, true)};
  SessionPool pool(kind.model, {});
  std::vector<std::thread> threads;
  std::vector<Session> expected;
  std::vector<std::string> texts(4);
  const auto options = [](std::size_t i) {
    return WriteOptions{
        .max_tokens = 150, .temperature = 0.3, .seed = i, .ahead = i % 2 == 0 ? 8 : 0};
  };
  for (std::size_t i = 0; i < texts.size(); ++i) {
    expected.push_back(started(kind));
    pool.add(std::to_string(i), expected.back());
    WriteOptions plain = options(i);
    plain.ahead = 0;
    texts[i] = expected.back().write(plain);
  }
  std::vector<std::string> written(texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) {
    threads.emplace_back([&, i] { written[i] = pool.write(std::to_string(i), options(i)); });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(written == texts);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    pool.use(std::to_string(i), [&](Session& session) { CHECK(same_bits(session, expected[i])); });
  }
}

TEST_CASE("guesses are what followed the same words before", "[ahead]") {
  SessionLog log(256);
  const auto read = [&](std::string_view text) {
    std::vector<std::int64_t> tokens;
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    log.start_call(CallKind::kRead, tokens);
  };
  const auto text_of = [](std::span<const std::int64_t> tokens) {
    return std::string(tokens.begin(), tokens.end());
  };
  read("The name of the steward is Aldous Finch. The name of the stewar");
  WriteOptions options{.ahead = 12};
  detail::Guesses guesses(options, log);
  guesses.append('d', false);
  CHECK(text_of(guesses.next(100)) == " is Aldous F");
  SECTION("fewer and later after guesses that were wrong, more after right ones") {
    guesses.append(' ', false);
    CHECK(guesses.next(100).empty());
    guesses.append('i', false);
    CHECK(text_of(guesses.next(100)) == "s");
    guesses.append('s', true);
    guesses.append(' ', false);
    CHECK(text_of(guesses.next(100)) == "Ald");
  }
  SECTION("as many as are left") {
    detail::Guesses others(options, log);
    others.append('d', false);
    CHECK(text_of(others.next(4)) == " is ");
  }
  SECTION("none where nothing was like it") {
    for (const char c : std::string("zqxjkvzqxjkv")) guesses.append(c, false);
    for (const char c : std::string("0123456789abcd")) guesses.append(c, false);
    CHECK(guesses.next(100).empty());
  }
}

}  // namespace fastweights::test
