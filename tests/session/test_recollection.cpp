#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/io/mapped_file.hpp"
#include "fastweights/session/state_file.hpp"
#include "small_session.hpp"

// A session with an exact store behind it; what it is after an edit is tested in test_edits.cpp.

using Catch::Matchers::ContainsSubstring;
using fastweights::ExactStoreOptions;
using fastweights::FileError;
using fastweights::Session;
using fastweights::SessionOptions;
using fastweights::StateFile;
using fastweights::StateMismatch;
using fastweights::test::Model;
using fastweights::test::noise;
using fastweights::test::random_model;
using fastweights::test::same_bits;
using fastweights::test::small_config;
using fastweights::test::TemporaryFolder;

namespace {

constexpr std::int64_t kPage = 256;  // entries of the nearest neighbours are dropped by pages

/// Keys of so many pages; the text is far from its budget.
SessionOptions with_store(std::int64_t pages = 1000, std::int64_t journal_bytes = 64 << 20) {
  ExactStoreOptions store;
  store.neighbours.count = 8;
  store.neighbours.bytes = pages * kPage * 65;
  return {.piece = 64, .journal_bytes = journal_bytes, .store = store};
}

Model quiet_model() {
  auto config = small_config();
  config.initializer_range = 0.05;  // nearly uniform: what is recalled decides
  return random_model(1, config);
}

}  // namespace

TEST_CASE("a session with a store recalls what the model cannot", "[recollection]") {
  const Model model = quiet_model();
  Session with(model, with_store());
  Session without(model, {.piece = 64});
  const std::string passage = noise(200, 7);
  for (Session* session : {&with, &without}) {
    session->read(passage);
    session->read(noise(4000, 3));
  }
  CHECK(without.score(passage) > 7.0);
  CHECK(with.score(passage) < 1.5);
  CHECK(with.report().store_tokens == 4200);
  CHECK(with.report().store_bytes > 4200 * 65);
  CHECK(without.report().store_tokens == 0);
  CHECK(without.report().store_bytes == 0);
}

TEST_CASE("a session writes on from what its store recalls, and learns what it writes",
          "[recollection]") {
  const Model model = quiet_model();
  Session session(model, with_store());
  REQUIRE(session.fused());
  const std::string passage = noise(200, 7);
  session.read(passage + noise(1000, 3) + passage.substr(0, 40));
  CHECK(session.write({.max_tokens = 100, .temperature = 0}) == passage.substr(40, 100));
  CHECK(session.report().store_tokens == 1340);
}

TEST_CASE("reading and writing give what a store gives beside the model", "[recollection]") {
  const Model model = quiet_model();
  Session read(model, with_store());
  Session written(model, with_store());
  for (Session* session : {&read, &written}) session->read(noise(300, 7));
  const std::string text = written.write({.max_tokens = 50});
  read.read(text);
  // Equal up to the rounding of the model's two paths, which may move a vote between buckets.
  CHECK(at::allclose(read.logits(), written.logits(), 0, 1e-2));
  CHECK(std::abs(read.logits().exp().sum().item<double>() - 1.0) < 1e-5);
}

TEST_CASE("text without strength is not found in the store", "[recollection]") {
  const Model model = quiet_model();
  Session session(model, with_store());
  session.read(noise(200, 7));
  session.read(noise(300, 3));
  CHECK(session.score(noise(200, 7)) < 2.0);
  session.feedback(0, 200, 0.0F);
  CHECK(session.score(noise(200, 7)) > 7.0);
}

TEST_CASE("a store goes back to what it has dropped, in memory and from a file", "[recollection]") {
  const Model model = quiet_model();
  const TemporaryFolder folder;
  const auto read_to = [&](std::int64_t size, std::int64_t journal_bytes) {
    Session session(model, with_store(2, journal_bytes));
    for (std::int64_t at = 0; at < size; at += 64) {
      session.read(noise(64, static_cast<std::uint32_t>(1 + at % 640)));
    }
    return session;
  };
  Session session = read_to(64 * 40, 64 << 20);
  session.save(folder / "a.fwstate");
  Session loaded = Session::load(folder / "a.fwstate", model);
  CHECK(same_bits(session, loaded));
  CHECK(loaded.options().store->neighbours.bytes == 2 * kPage * 65);
  CHECK(loaded.report().checkpoints == session.report().checkpoints);
  for (Session* each : {&session, &loaded}) {
    for (const std::int64_t end : {64 * 39, 64 * 30, 64 * 5, 64, 0}) {
      INFO(end);
      Session back = *each;
      std::int64_t replayed = 0;
      back.rollback(end, [&](std::int64_t done, std::int64_t) {
        replayed = done;
        return true;
      });
      CHECK(replayed == 0);  // there was a checkpoint
      CHECK(same_bits(back, read_to(end, 0)));
      back.read(noise(500, 3));
      Session expected = read_to(end, 0);
      expected.read(noise(500, 3));
      CHECK(same_bits(back, expected));
    }
  }
}

TEST_CASE("a file holds a store once, not once for every checkpoint", "[recollection]") {
  const Model model = quiet_model();
  const TemporaryFolder folder;
  Session session(model, with_store());
  session.read(noise(64, 1));
  const auto size = [&](Session& each) {
    each.save(folder / "a.fwstate");
    return static_cast<std::int64_t>(std::filesystem::file_size(folder / "a.fwstate"));
  };
  const auto small = size(session);
  session.read(noise(64 * 63, 2));
  const auto checkpoints = session.report().checkpoints;
  REQUIRE(checkpoints == 64);
  Session plain(model, {.piece = 64});
  plain.read(noise(64, 1));
  const auto plain_small = size(plain);
  plain.read(noise(64 * 63, 2));
  const auto of_tensors = size(plain) - plain_small;
  const auto of_store = size(session) - small - of_tensors;
  // Keys, tokens and text of 4096 tokens, and some kilobytes of weights for each checkpoint.
  CHECK(of_store < 4096 * 70 + checkpoints * 40000);
}

TEST_CASE("checkpoints count what they keep of a store from being dropped", "[recollection]") {
  const Model model = quiet_model();
  const auto bytes = [&](std::int64_t pages) {
    SessionOptions options = with_store(pages);
    options.piece = 1024;
    Session session(model, options);
    for (std::uint32_t i = 0; i < 20; ++i) session.read(noise(1024, i + 1));
    REQUIRE(session.report().checkpoints == 20);
    return session.report().checkpoint_bytes;
  };
  // With four pages all are dropped from one checkpoint to the next; without a limit the page that
  // was not full is copied.
  CHECK(bytes(4) - bytes(1000) == 19 * 3 * kPage * 65);
}

TEST_CASE("what was committed keeps its store", "[recollection]") {
  const Model model = quiet_model();
  const TemporaryFolder folder;
  Session session(model, with_store(2, 0));
  session.read(noise(1000, 1));
  session.commit();
  const Session at_commit = session;
  session.read(noise(3000, 2));
  session.save(folder / "a.fwstate");
  Session loaded = Session::load(folder / "a.fwstate", model);
  for (Session* each : {&session, &loaded}) {
    each->rollback(1000);
    CHECK(same_bits(*each, at_commit));
  }
}

TEST_CASE("copies of a session share its store", "[recollection]") {
  const Model model = quiet_model();
  Session session(model, with_store());
  session.read(noise(20000, 1));
  Session fork = session.fork();
  fork.read(noise(300, 7));
  CHECK(fork.score(noise(300, 7)) < 1.5);
  CHECK(session.score(noise(300, 7)) > 7.0);  // nothing of it came here
  CHECK(session.report().store_tokens == 20000);
}

TEST_CASE("a file whose store does not belong to it is refused", "[recollection]") {
  const Model model = quiet_model();
  const TemporaryFolder folder;
  Session session(model, with_store());
  session.read(noise(200, 1));
  session.save(folder / "a.fwstate");
  const fastweights::io::MappedFile mapped(folder / "a.fwstate");
  const StateFile file = fastweights::parse_state_file(mapped.bytes());
  const auto load = [&](const StateFile& changed) {
    fastweights::write_state_file(folder / "b.fwstate", changed);
    return Session::load(folder / "b.fwstate", model);
  };
  CHECK(same_bits(load(file), session));
  const auto named = [](StateFile& in, const std::string& name) {
    return std::ranges::find(in.tensors, name, &fastweights::io::TensorData::name);
  };
  StateFile without = file;
  without.tensors.erase(named(without, "store.place"));
  CHECK_THROWS_AS(load(without), StateMismatch);
  StateFile renamed = file;
  named(renamed, "store.place")->name = "store.palace";
  CHECK_THROWS_AS(load(renamed), FileError);
  const std::vector<std::int64_t> place = {199, 199, 0, 198};
  StateFile shorter = file;
  named(shorter, "store.place")->bytes = std::as_bytes(std::span(place));
  CHECK_THROWS_WITH(load(shorter), ContainsSubstring("does not belong to its log") ||
                                       ContainsSubstring("a match is none of this text"));
  const std::vector<std::int64_t> far = {1 << 30, 1 << 30, 0, 5};
  StateFile longer = file;
  named(longer, "store.place")->bytes = std::as_bytes(std::span(far));
  CHECK_THROWS_AS(load(longer), FileError);
}
