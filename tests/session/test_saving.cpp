#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/io/mapped_file.hpp"
#include "fastweights/session/session.hpp"
#include "fastweights/session/state_file.hpp"
#include "small_session.hpp"

// State files of sessions that can go back, and of processes that die.

using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;
using fastweights::Error;
using fastweights::FileError;
using fastweights::parse_state_file;
using fastweights::Session;
using fastweights::StateFile;
using fastweights::StateMismatch;
using fastweights::io::MappedFile;
using fastweights::test::get;
using fastweights::test::names_in;
using fastweights::test::noise;
using fastweights::test::random_model;
using fastweights::test::same_bits;
using fastweights::test::TemporaryFolder;
namespace fs = std::filesystem;
namespace io = fastweights::io;

namespace {

/// A session with everything in its log.
Session edited_session() {
  Session session(random_model(), {.piece = 16, .seed = 2});
  session.read(noise(50));
  session.commit();
  session.read(noise(70, 2));
  session.mark();
  session.write({.max_tokens = 30, .seed = 5});
  session.feedback(100, 140, 1.5F);
  session.revoke(60, 65);
  return session;
}

}  // namespace

TEST_CASE("a loaded session goes back like the one that was saved", "[saving]") {
  const TemporaryFolder folder;
  Session session = edited_session();
  const auto mark = session.marks().front();
  const auto gone = session.mark();
  session.rollback(gone);
  session.write({.max_tokens = 4});
  const auto later = session.mark();
  session.rollback(gone);
  session.save(folder / "a.fwstate");
  Session loaded = Session::load(folder / "a.fwstate", random_model());
  CHECK(same_bits(loaded, session));
  CHECK((loaded.log() == session.log()));
  CHECK((loaded.marks() == session.marks()));
  CHECK(loaded.position(mark) == 115);
  CHECK_THROWS_WITH(loaded.rollback(later), ContainsSubstring("rolled back to before it"));
  CHECK(loaded.report().checkpoints == session.report().checkpoints);
  CHECK(loaded.report().checkpoint_bytes == session.report().checkpoint_bytes);
  std::int64_t replayed = 0;
  loaded.rollback(120, [&](std::int64_t, std::int64_t total) {
    replayed = total;
    return true;
  });
  CHECK(replayed <= 16);  // from a checkpoint that was in the file
  session.rollback(120);
  CHECK(same_bits(loaded, session));
  loaded.feedback(mark, 0.5F);
  session.feedback(mark, 0.5F);
  CHECK(same_bits(loaded, session));
  loaded.rollback(50);
  session.rollback(50);
  CHECK(same_bits(loaded, session));
  CHECK(loaded.write({.max_tokens = 20}) == session.write({.max_tokens = 20}));
  loaded.save(folder / "b.fwstate");
  session.save(folder / "c.fwstate");
  CHECK(get(folder / "b.fwstate") == get(folder / "c.fwstate"));
}

TEST_CASE("a session saved by version 1 goes on, and back", "[saving]") {
  const TemporaryFolder folder;
  Session session(random_model(), {.piece = 16, .seed = 2});
  session.read(noise(70));
  session.write({.max_tokens = 10, .seed = 5});
  session.save(folder / "new.fwstate");
  // What version 1 wrote of this session.
  const MappedFile mapped(folder / "new.fwstate");
  const StateFile now = parse_state_file(mapped.bytes());
  const auto view =
      io::SafetensorsView::parse(mapped.bytes().subspan(24, mapped.bytes().size() - 40), "content");
  std::vector<io::TensorData> tensors;
  for (const io::TensorInfo& info : view.tensors()) {
    const bool known =
        !info.name.starts_with("checkpoints.") &&
        (!info.name.starts_with("log.") || info.name == "log.tokens" || info.name == "log.calls");
    if (known) tensors.push_back({info.name, info.type, info.shape, view.bytes(info)});
  }
  io::Metadata metadata;
  for (const char* key : {"model", "vocabulary_size", "piece", "seed"}) {
    metadata[key] = view.metadata().at(key);
  }
  const auto bytes =
      fastweights::detail::seal_state_file(io::serialize_safetensors(tensors, metadata), 1);
  std::ofstream(folder / "old.fwstate", std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));

  Session old = Session::load(folder / "old.fwstate", random_model());
  CHECK(same_bits(old, session));
  CHECK((old.log() == session.log()));
  CHECK(old.report().checkpoints == 0);
  old.rollback(33);
  session.rollback(33);
  CHECK(same_bits(old, session));
}

TEST_CASE("a file whose states do not fit its log is refused", "[saving]") {
  const TemporaryFolder folder;
  const fs::path path = folder / "a.fwstate";
  edited_session().save(path);
  const MappedFile mapped(path);
  const auto refused = [&](auto change, const std::string& why) {
    StateFile file = parse_state_file(mapped.bytes());
    change(file);
    write_state_file(folder / "b.fwstate", file);
    CHECK_THROWS_WITH(Session::load(folder / "b.fwstate", random_model()), ContainsSubstring(why));
  };
  const auto drop = [](const char* prefix) {
    return [prefix](StateFile& file) {
      std::erase_if(file.tensors, [&](const auto& each) { return each.name.starts_with(prefix); });
    };
  };
  CHECK_NOTHROW(Session::load(path, random_model()));
  refused(drop("base.logits"), "tensors");
  refused(drop("checkpoints.0."), "tensors");
  refused(drop("position"), "tensors");
  refused([](StateFile& file) { file.checkpoints.pop_back(); }, "tensors");
  refused(
      [](StateFile& file) {
        for (auto& each : file.tensors) {
          if (each.name == "checkpoints.0.logits") each.name = "checkpoints.0.other";
        }
      },
      "no tensor checkpoints.0.logits");
  refused(
      [](StateFile& file) {
        for (auto& each : file.tensors) {
          if (each.name == "base.position") {
            static const std::int64_t wrong = 49;
            each.bytes = std::as_bytes(std::span(&wrong, 1));
          }
        }
      },
      "do not belong to its log");
}

TEST_CASE("a process that is killed while it saves leaves a whole file", "[saving]") {
  const TemporaryFolder folder;
  const fs::path path = folder / "a.fwstate";
  const auto model = random_model();
  std::vector<Session> sessions(2, Session(model, {.piece = 16}));
  sessions[0].read(noise(2000));
  sessions[1].read(noise(1500, 2));
  sessions[1].write({.max_tokens = 100});
  sessions[0].save(path);
  std::mt19937 random(1);
  int first = 0;
  int second = 0;
  int interrupted = 0;
  for (int kill_number = 0; kill_number < 100; ++kill_number) {
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      for (std::size_t i = 1;; ++i) sessions[i % 2].save(path);
    }
    std::this_thread::sleep_for(
        std::chrono::microseconds(std::uniform_int_distribution<int>(0, 30000)(random)));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    const Session loaded = Session::load(path, model);
    const bool is_first = same_bits(loaded, sessions[0]);
    REQUIRE((is_first || same_bits(loaded, sessions[1])));
    ++(is_first ? first : second);
    interrupted += names_in(folder.path()).size() > 1 ? 1 : 0;  // what it had not renamed yet
    for (const auto& entry : fs::directory_iterator(path.parent_path())) {
      if (entry.path() != path) fs::remove(entry.path());
    }
  }
  INFO(first << " times the one, " << second << " times the other, " << interrupted
             << " times in the middle");
  CHECK(first > 0);
  CHECK(second > 0);
  CHECK(interrupted > 0);
}
