#include <sys/stat.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cstdint>
#include <filesystem>
#include <latch>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/session/session.hpp"
#include "fastweights/session/session_pool.hpp"
#include "small_session.hpp"

namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;
using fastweights::Cancelled;
using fastweights::Error;
using fastweights::FileError;
using fastweights::Mark;
using fastweights::Session;
using fastweights::SessionPool;
using fastweights::SessionPoolOptions;
using fastweights::WriteOptions;
using fastweights::test::FileSizeLimit;
using fastweights::test::Model;
using fastweights::test::noise;
using fastweights::test::random_model;
using fastweights::test::same_bits;
using fastweights::test::small_config;
using fastweights::test::TemporaryFolder;

namespace {

/// A lone session with the calls of one in a pool.
struct Alone {
  Session session;

  void read(std::string_view text) { session.read(text); }
  std::string write(const WriteOptions& options) { return session.write(options); }
  template <class Work>
  auto use(Work work) {
    return work(session);
  }
};

struct InPool {
  SessionPool& pool;
  std::string id;

  void read(std::string_view text) { pool.read(id, text); }
  std::string write(const WriteOptions& options) { return pool.write(id, options); }
  template <class Work>
  auto use(Work work) {
    return pool.use(id, work);
  }
};

/// A life of a session, another for each number; returns what it wrote and scored.
template <class Driver>
std::string drive(Driver driver, std::uint32_t number) {
  std::string out;
  driver.read(noise(100 + 13 * number, number));
  out += driver.write({.max_tokens = 70, .seed = number});
  const Mark mark = driver.use([](Session& session) { return session.mark(); });
  out += driver.write({.max_tokens = 20, .temperature = 0.0});
  driver.read(noise(40, number + 100));
  driver.use([&](Session& session) { session.feedback(mark, 1.5F); });
  out += driver.write({.max_tokens = 15, .top_k = 5});
  if (number % 2 == 0) driver.use([&](Session& session) { session.rollback(mark); });
  std::string seen;
  WriteOptions asking{.max_tokens = 50, .top_p = 0.9};
  asking.on_token = [&](std::string_view bytes) {
    seen += bytes;
    return seen.size() < 10 + number;
  };
  out += driver.write(asking) + seen;
  driver.use([](Session& session) { session.revoke(10, 20); });
  if (number % 3 == 0) driver.use([](Session& session) { session.commit(); });
  out += driver.write({.max_tokens = 30, .stop = {"e", out.substr(0, 1)}});
  out += std::to_string(driver.use([](Session& session) { return session.score("a text"); }));
  return out;
}

/// Runs `body(i)` on a thread for each i.
template <class Body>
void on_threads(std::uint32_t count, Body body) {
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

std::string name_of(std::uint32_t number) { return "session " + std::to_string(number); }

Session copy_of(SessionPool& pool, const std::string& id) {
  return pool.use(id, [](Session& session) { return session; });
}

/// Bytes that a session of the small model holds without checkpoints.
std::int64_t fresh_bytes(const Model& model, const fastweights::SessionOptions& options = {}) {
  SessionPool pool(model, {.session = options});
  pool.create("a");
  return pool.report().resident_bytes;
}

std::vector<fs::path> files_in(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& each : fs::recursive_directory_iterator(folder)) files.push_back(each.path());
  return files;
}

}  // namespace

// ---- the same bits -----------------------------------------------------------------------------

TEST_CASE("a session in a pool is a lone one, whoever else is there", "[session_pool]") {
  constexpr std::uint32_t kSessions = 7;
  const auto run = [](const Model& model, SessionPoolOptions options) {
    options.session.piece = 32;
    options.session.journal_bytes = 1 << 20;
    SessionPool pool(model, options);
    std::vector<std::string> texts(kSessions);
    on_threads(kSessions, [&](std::uint32_t i) {
      pool.create(name_of(i), i);
      texts[i] = drive(InPool{pool, name_of(i)}, i);
    });
    for (std::uint32_t i = 0; i < kSessions; ++i) {
      INFO(name_of(i));
      fastweights::SessionOptions own = options.session;
      own.seed = i;
      Alone alone{Session(model, own)};
      CHECK(texts[i] == drive<Alone&>(alone, i));
      const Session pooled = copy_of(pool, name_of(i));
      CHECK(same_bits(pooled, alone.session));
      CHECK(pooled.log() == alone.session.log());
      CHECK(pooled.report().checkpoints == alone.session.report().checkpoints);
    }
    return pool.report();
  };
  SECTION("in memory") {
    const auto report = run(random_model(), {});
    CHECK(report.saves == 0);
    CHECK(report.batches < report.tokens_written);
    CHECK(report.mean_batch() > 1.0);
  }
  SECTION("on disk in between") {
    const TemporaryFolder folder;
    const auto model = random_model();
    const auto report =
        run(model, {.memory_bytes = 4 * fresh_bytes(model), .folder = folder / "idle"});
    CHECK(report.saves > 0);
    CHECK(report.loads > 0);
  }
  SECTION("in batches of two") {
    const auto report = run(random_model(), {.most_per_batch = 2});
    CHECK(report.mean_batch() <= 2.0);
  }
  SECTION("with a memory at the head") {
    auto config = small_config();
    config.fast_head = true;
    run(random_model(1, config), {});
  }
  SECTION("with an exact store") {
    run(random_model(), {.session = {.store = fastweights::ExactStoreOptions{}}});
  }
  SECTION("with an exact store, on disk in between") {
    const TemporaryFolder folder;
    const auto report =
        run(random_model(), {.memory_bytes = 1 << 19,
                             .folder = folder / "idle",
                             .session = {.store = fastweights::ExactStoreOptions{}}});
    CHECK(report.loads > 0);
  }
  SECTION("on a model that has no fused kernels") {
    torch::manual_seed(1);
    auto model = std::make_shared<fastweights::nn::LanguageModelImpl>(small_config());
    model->to(at::kDouble);
    model->eval();
    run(model, {});
  }
}

TEST_CASE("a batch takes as many as it may", "[session_pool]") {
  SessionPool pool(random_model(), {.most_per_batch = 1});
  on_threads(3, [&](std::uint32_t i) {
    pool.create(name_of(i));
    pool.write(name_of(i), {.max_tokens = 40});
  });
  CHECK(pool.report().tokens_written == 120);
  CHECK(pool.report().batches == 120);
  CHECK(pool.report().mean_batch() == 1.0);
}

TEST_CASE("a pool takes sessions in and gives them out", "[session_pool]") {
  const TemporaryFolder folder;
  const auto model = random_model();
  Session session(model, {.piece = 16});
  session.read(noise(50));
  const Mark mark = session.mark();
  session.save(folder / "a.fwstate");
  SessionPool pool(model);
  pool.add("added", session);
  pool.load("loaded", folder / "a.fwstate");
  CHECK(pool.ids() == std::vector<std::string>{"added", "loaded"});
  session.write({.max_tokens = 5, .seed = 3});
  for (const std::string id : {"added", "loaded"}) {
    pool.write(id, {.max_tokens = 5, .seed = 3});
    CHECK(same_bits(copy_of(pool, id), session));
    CHECK(pool.use(id, [&](Session& s) { return s.position(mark); }) == 50);
  }
  pool.save("added", folder / "b.fwstate");
  CHECK(same_bits(Session::load(folder / "b.fwstate", model), session));
  pool.close("added");
  CHECK_FALSE(pool.contains("added"));
  CHECK(pool.contains("loaded"));
  CHECK(pool.report().resident == 1);
  CHECK_THROWS_WITH(pool.read("added", "x"), ContainsSubstring("no session 'added'"));
}

// ---- turns -------------------------------------------------------------------------------------

TEST_CASE("a long read and a long write do not starve others", "[session_pool]") {
  constexpr std::int64_t kLong = 20000;
  std::atomic<bool> done = false;
  const auto poll = [&] {
    if (done) throw std::runtime_error("the short call was served in between");
  };
  SessionPool pool(random_model(), {.session = {.piece = 1, .journal_bytes = 0}, .poll = poll});
  pool.create("long");
  pool.create("short");
  const auto once = [&](auto has_begun, auto call) {
    return std::thread([&, has_begun, call] {
      while (!has_begun(pool.report())) std::this_thread::yield();
      call();
      done = true;
    });
  };
  SECTION("a write ends while a text is read") {
    std::thread other = once([](const auto& report) { return report.pieces_read > 0; },
                             [&] { pool.write("short", {.max_tokens = 30}); });
    CHECK_THROWS_WITH(pool.read("long", noise(kLong)), ContainsSubstring("in between"));
    other.join();
  }
  SECTION("a text is read while another session writes") {
    std::thread other = once([](const auto& report) { return report.tokens_written > 0; },
                             [&] { pool.read("short", noise(30)); });
    CHECK_THROWS_WITH(pool.write("long", {.max_tokens = kLong}), ContainsSubstring("in between"));
    other.join();
  }
}

TEST_CASE("calls on one session come one after another, those on two at once", "[session_pool]") {
  SessionPool pool(random_model());
  pool.create("a");
  pool.create("b");
  int inside = 0;
  int most = 0;
  on_threads(8, [&](std::uint32_t) {
    for (int i = 0; i < 50; ++i) {
      pool.use("a", [&](Session& session) {
        most = std::max(most, ++inside);
        session.read("x");
        --inside;
      });
    }
  });
  CHECK(most == 1);
  CHECK(pool.use("a", [](Session& session) { return session.position(); }) == 400);
  std::barrier both(2);  // neither passes without the other
  on_threads(2, [&](std::uint32_t i) {
    pool.use(i == 0 ? "a" : "b", [&](Session&) { both.arrive_and_wait(); });
  });
}

TEST_CASE("callbacks run on the thread of their call", "[session_pool]") {
  SessionPool pool(random_model(), {.session = {.piece = 4}});
  pool.create("a");
  const auto here = std::this_thread::get_id();
  int calls = 0;
  const auto count = [&] {
    CHECK(std::this_thread::get_id() == here);
    ++calls;
  };
  pool.read("a", "twelve bytes", [&](std::int64_t done, std::int64_t total) {
    count();
    CHECK(done == 4 * calls);
    CHECK(total == 12);
    return true;
  });
  CHECK(calls == 3);
  WriteOptions options{.max_tokens = 5};
  options.on_token = [&](std::string_view bytes) {
    count();
    CHECK(bytes.size() == 1);
    return true;
  };
  pool.write("a", options);
  CHECK(calls == 8);
  pool.use("a", [&](Session&) { count(); });
  CHECK(calls == 9);
}

// ---- ends --------------------------------------------------------------------------------------

TEST_CASE("a call that is stopped leaves what a lone session has then", "[session_pool]") {
  const auto model = random_model();
  SessionPool pool(model, {.session = {.piece = 8}});
  pool.create("a");
  Session alone(model, {.piece = 8});
  const std::string text = noise(100);
  const auto stop = [](std::int64_t done, std::int64_t) { return done < 24; };
  CHECK_THROWS_AS(pool.read("a", text, stop), Cancelled);
  CHECK_THROWS_AS(alone.read(text, stop), Cancelled);
  CHECK(same_bits(copy_of(pool, "a"), alone));
  const auto fail = [](std::int64_t, std::int64_t) -> bool { throw std::runtime_error("mine"); };
  CHECK_THROWS_WITH(pool.read("a", text, fail), "mine");
  CHECK_THROWS_WITH(alone.read(text, fail), "mine");
  CHECK(same_bits(copy_of(pool, "a"), alone));
  const auto at_third = [](auto then) {
    WriteOptions options{.max_tokens = 50};
    options.on_token = [then, count = 0](std::string_view) mutable {
      return ++count == 3 ? then() : true;
    };
    return options;
  };
  CHECK(pool.write("a", at_third([] { return false; })) ==
        alone.write(at_third([] { return false; })));
  CHECK(same_bits(copy_of(pool, "a"), alone));
  const auto fail_too = []() -> bool { throw std::runtime_error("mine too"); };
  CHECK_THROWS_WITH(pool.write("a", at_third(fail_too)), "mine too");
  CHECK_THROWS_WITH(alone.write(at_third(fail_too)), "mine too");
  CHECK(same_bits(copy_of(pool, "a"), alone));
  CHECK(pool.write("a", {.max_tokens = 0}).empty());
  pool.read("a", "");
  CHECK(same_bits(copy_of(pool, "a"), alone));
  CHECK(copy_of(pool, "a").log() == alone.log());
}

TEST_CASE("an exception reaches its own caller alone", "[session_pool]") {
  SessionPool pool(random_model());
  std::atomic<int> thrown = 0;
  std::vector<std::string> texts(6);
  on_threads(6, [&](std::uint32_t i) {
    pool.create(name_of(i), i);
    WriteOptions options{.max_tokens = 60};
    options.on_token = [&, i, count = 0](std::string_view) mutable {
      if (i % 2 == 0 && ++count == 20) throw std::runtime_error(name_of(i));
      return true;
    };
    try {
      texts[i] = pool.write(name_of(i), options);
    } catch (const std::runtime_error& error) {
      if (error.what() == name_of(i)) ++thrown;
    }
  });
  CHECK(thrown == 3);
  for (std::uint32_t i = 0; i < 6; ++i) CHECK(texts[i].size() == (i % 2 == 0 ? 0 : 60));
  CHECK(copy_of(pool, name_of(0)).position() == 20);
  CHECK(copy_of(pool, name_of(1)).position() == 60);
}

TEST_CASE("poll ends a call that waits", "[session_pool]") {
  std::atomic<bool> enough = false;
  const auto poll = [&] {
    if (enough) throw std::runtime_error("enough");
  };
  SessionPool pool(random_model(), {.session = {.piece = 4, .journal_bytes = 0}, .poll = poll});
  pool.create("a");
  const auto has_begun = [&](auto grown) {
    while (!grown(pool.report())) std::this_thread::yield();
    enough = true;
  };
  SECTION("a write") {
    std::thread other(has_begun, [](const auto& report) { return report.tokens_written > 5; });
    CHECK_THROWS_WITH(pool.write("a", {.max_tokens = 1'000'000'000}), "enough");
    other.join();
  }
  SECTION("a read") {
    std::thread other(has_begun, [](const auto& report) { return report.pieces_read > 1; });
    CHECK_THROWS_WITH(pool.read("a", noise(20'000'000)), "enough");
    other.join();
  }
  CHECK(copy_of(pool, "a").position() > 5);
}

TEST_CASE("the end of a pool ends its calls", "[session_pool]") {
  auto pool =
      std::make_unique<SessionPool>(random_model(), SessionPoolOptions{.session = {.piece = 4}});
  for (const char* id : {"writes", "reads", "is used"}) pool->create(id);
  SessionPool& calls = *pool;
  std::latch begun(3);
  std::atomic<int> cancelled = 0;
  const auto expect_cancelled = [&](auto call) {
    try {
      call();
    } catch (const Cancelled&) {
      ++cancelled;
    }
  };
  std::atomic<bool> ended = false;
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    expect_cancelled([&] {
      WriteOptions options{.max_tokens = 1'000'000'000};
      options.on_token = [&, first = true](std::string_view) mutable {
        if (std::exchange(first, false)) begun.count_down();
        return true;
      };
      calls.write("writes", options);
    });
  });
  threads.emplace_back([&] {
    expect_cancelled([&] {
      calls.read("reads", noise(20'000'000), [&, first = true](auto...) mutable {
        if (std::exchange(first, false)) begun.count_down();
        return true;
      });
    });
  });
  threads.emplace_back([&] {
    calls.use("is used", [&](Session& session) {
      begun.count_down();
      // Until a call that waits for its turn is told so: the pool waits for this one.
      while (cancelled < 1) std::this_thread::yield();
      session.read("to the end");
      ended = true;
    });
  });
  begun.wait();
  threads.emplace_back([&] { expect_cancelled([&] { calls.read("is used", "x"); }); });
  pool.reset();
  CHECK(ended);
  for (std::thread& thread : threads) thread.join();
  CHECK(cancelled == 3);
}

// ---- errors ------------------------------------------------------------------------------------

TEST_CASE("what a pool refuses", "[session_pool]") {
  const auto model = random_model();
  CHECK_THROWS_WITH(SessionPool(nullptr), ContainsSubstring("there is no model"));
  CHECK_THROWS_WITH(SessionPool(model, {.session = {.piece = 0}}), ContainsSubstring("piece"));
  CHECK_THROWS_WITH(SessionPool(model, {.memory_bytes = -1}), ContainsSubstring("memory_bytes"));
  CHECK_THROWS_WITH(SessionPool(model, {.most_per_batch = 0}), ContainsSubstring("most_per_batch"));
  CHECK_THROWS_AS(SessionPool(model, {.folder = "/proc/none/such"}), FileError);
  SessionPool pool(model);
  pool.create("a");
  CHECK_THROWS_WITH(pool.create("a"), ContainsSubstring("already"));
  CHECK_THROWS_WITH(pool.create(""), ContainsSubstring("1 to 80 bytes, got 0"));
  CHECK_THROWS_WITH(pool.create(std::string(81, 'a')), ContainsSubstring("got 81"));
  CHECK_THROWS_WITH(pool.write("b"), ContainsSubstring("no session 'b'"));
  CHECK_THROWS_WITH(pool.close("b"), ContainsSubstring("no session 'b'"));
  CHECK_THROWS_WITH(pool.write("a", {.max_tokens = -1}), ContainsSubstring("max_tokens"));
  CHECK_THROWS_WITH(pool.write("a", {.temperature = -1}), ContainsSubstring("temperature"));
  CHECK_THROWS_AS(pool.load("b", "/none/such.fwstate"), FileError);
  CHECK_THROWS_WITH(pool.add("b", Session(random_model(2))), ContainsSubstring("pool's model"));
  const auto exchange = [](Session& session) { session = Session(random_model(2)); };
  CHECK_THROWS_WITH(pool.use("a", exchange), ContainsSubstring("pool's model"));
  CHECK_THROWS_WITH(pool.use("a", [](Session& session) { Session gone = std::move(session); }),
                    ContainsSubstring("pool's model"));
  const auto fail = [](Session&) -> int { throw std::runtime_error("mine"); };
  CHECK_THROWS_WITH(pool.use("a", fail), "mine");
  CHECK(pool.ids() == std::vector<std::string>{"a"});
  CHECK(same_bits(copy_of(pool, "a"), Session(model)));
}

TEST_CASE("a callback that calls its pool is told so", "[session_pool]") {
  SessionPool pool(random_model());
  pool.create("a");
  pool.create("b");
  const auto call = [&](auto...) -> bool {
    CHECK(pool.contains("a"));
    pool.read("b", "x");
    return true;
  };
  const auto refused = ContainsSubstring("must not call the pool");
  CHECK_THROWS_WITH(pool.use("a", call), refused);
  CHECK_THROWS_WITH(pool.read("a", "x", call), refused);
  CHECK_THROWS_WITH(pool.write("a", {.max_tokens = 1, .on_token = call}), refused);
  pool.read("b", "x");
  CHECK(copy_of(pool, "b").position() == 1);
}

// ---- memory ------------------------------------------------------------------------------------

TEST_CASE("idle sessions go to disk, the one that was used longest ago first", "[session_pool]") {
  const TemporaryFolder folder;
  const auto model = random_model();
  const fastweights::SessionOptions options{.journal_bytes = 0};
  const std::int64_t limit = 3 * fresh_bytes(model, options) + 4000;
  std::optional<SessionPool> pool;
  pool.emplace(model, SessionPoolOptions{
                          .memory_bytes = limit, .folder = folder / "idle", .session = options});
  const auto files = [&] {
    std::vector<std::string> names;
    for (const auto& path : files_in(folder / "idle")) {
      if (path.extension() == ".fwstate") names.push_back(path.stem());
    }
    std::ranges::sort(names);
    return names;
  };
  using Names = std::vector<std::string>;
  for (const char* id : {"a", "b", "c"}) {
    pool->create(id);
    pool->read(id, id);
  }
  CHECK(files().empty());
  pool->read("a", "again");
  pool->create("../d");
  CHECK(files() == Names{"b"});
  pool->create("e/\n");
  CHECK(files() == Names{"b", "c"});
  pool->create("f");
  pool->create("g");
  CHECK(files() == Names{"%2E%2E%2Fd", "a", "b", "c"});
  const auto report = pool->report();
  CHECK(report.resident == 3);
  CHECK(report.on_disk == 4);
  CHECK(report.saves == 4);
  CHECK(report.resident_bytes <= limit);
  struct stat status{};
  for (const auto& path : files_in(folder / "idle")) {
    REQUIRE(stat(path.c_str(), &status) == 0);
    CHECK((status.st_mode & 0777) == (fs::is_directory(path) ? 0700U : 0600U));
  }
  REQUIRE(stat((folder / "idle").c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0700U);

  Session alone(model, options);
  alone.read("a");
  alone.read("again");
  CHECK(same_bits(copy_of(*pool, "a"), alone));
  CHECK(pool->report().loads == 1);
  CHECK(files() == Names{"%2E%2E%2Fd", "b", "c", "e%2F%0A"});
  pool->close("b");
  pool->close("../d");
  CHECK(files() == Names{"c", "e%2F%0A"});
  CHECK(pool->report().on_disk == 2);
  pool.reset();
  CHECK(files_in(folder / "idle").empty());
}

TEST_CASE("what a call adds is made room for when it ends", "[session_pool]") {
  const TemporaryFolder folder;
  const auto model = random_model();
  const std::int64_t limit = 6 * fresh_bytes(model);
  SessionPool pool(model,
                   {.memory_bytes = limit, .folder = folder.path(), .session = {.piece = 8}});
  for (const char* id : {"a", "b", "c"}) pool.create(id);
  CHECK(pool.report().on_disk == 0);
  pool.read("c", noise(24));  // three checkpoints
  CHECK(pool.report().on_disk == 1);
  CHECK(pool.report().resident_bytes <= limit);
  pool.read("c", noise(800));  // too many for the limit, but one session always has room
  CHECK(pool.report().resident == 1);
  CHECK(pool.report().resident_bytes > limit);
  pool.read("a", "x");
  CHECK(pool.report().resident == 1);
  CHECK(pool.report().resident_bytes <= limit);
}

TEST_CASE("calls wait for room that others hold", "[session_pool]") {
  const TemporaryFolder folder;
  const auto model = random_model();
  SessionPool pool(model, {.memory_bytes = 1, .folder = folder.path(), .session = {.piece = 16}});
  std::atomic<int> inside = 0;
  std::atomic<int> most = 0;
  on_threads(5, [&](std::uint32_t i) {
    pool.create(name_of(i), i);
    for (int again = 0; again < 4; ++again) {
      pool.use(name_of(i), [&](Session& session) {
        const int now = ++inside;
        if (now > most) most = now;
        session.read(noise(20, i));
        --inside;
      });
      pool.write(name_of(i), {.max_tokens = 10});
    }
  });
  CHECK(most == 1);
  for (std::uint32_t i = 0; i < 5; ++i) {
    Session alone(model, {.piece = 16, .seed = i});
    for (int again = 0; again < 4; ++again) {
      alone.read(noise(20, i));
      alone.write({.max_tokens = 10});
    }
    CHECK(same_bits(copy_of(pool, name_of(i)), alone));
  }
}

TEST_CASE("where sessions cannot go to disk nothing is lost", "[session_pool]") {
  const TemporaryFolder folder;
  const auto model = random_model();
  const fastweights::SessionOptions options{.journal_bytes = 0};
  const std::int64_t limit = 2 * fresh_bytes(model, options) + 4000;
  const auto expect_whole = [&](SessionPool& pool) {
    CHECK(pool.ids() == std::vector<std::string>{"a", "b"});
    Session alone(model, options);
    for (const char* id : {"a", "b"}) {
      alone = Session(model, options);
      alone.read(id);
      CHECK(same_bits(copy_of(pool, id), alone));
    }
  };
  const auto fill = [&](SessionPool& pool) {
    for (const char* id : {"a", "b"}) {
      pool.create(id);
      pool.read(id, id);
    }
  };
  SECTION("without a folder") {
    SessionPool pool(model, {.memory_bytes = limit, .session = options});
    fill(pool);
    CHECK_THROWS_WITH(pool.create("c"), ContainsSubstring("memory_bytes"));
    expect_whole(pool);
  }
  SECTION("on a full disk") {
    SessionPool pool(model, {.memory_bytes = limit, .folder = folder.path(), .session = options});
    fill(pool);
    {
      const FileSizeLimit full(100);
      CHECK_THROWS_AS(pool.create("c"), FileError);
      expect_whole(pool);
      pool.read("a", noise(3 * 4096));  // needs no room before it begins
      pool.use("a", [](Session& session) { session.rollback(1); });
    }
    expect_whole(pool);
    pool.create("c");
    CHECK(pool.report().on_disk == 1);
    pool.close("c");
    expect_whole(pool);
  }
  SECTION("in a folder that is gone") {
    SessionPool pool(model, {.memory_bytes = limit, .folder = folder.path(), .session = options});
    fill(pool);
    fs::remove_all(folder.path());
    CHECK_THROWS_AS(pool.create("c"), FileError);
    expect_whole(pool);
  }
}

TEST_CASE("an idle session's file that was altered is refused", "[session_pool]") {
  const TemporaryFolder folder;
  const auto model = random_model();
  SessionPool pool(model, {.memory_bytes = 1, .folder = folder.path()});
  pool.create("a");
  pool.create("b");
  fs::path file;
  for (const auto& path : files_in(folder.path())) {
    if (path.filename() == "a.fwstate") file = path;
  }
  REQUIRE_FALSE(file.empty());
  const std::string whole = fastweights::test::get(file);
  fastweights::test::put(file, whole.substr(0, 1000));
  CHECK_THROWS_AS(pool.read("a", "x"), FileError);
  pool.read("b", "x");
  CHECK(pool.report().resident == 1);
  fastweights::test::put(file, whole);
  pool.read("a", "x");
  CHECK(copy_of(pool, "a").position() == 1);
}
