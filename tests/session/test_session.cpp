#include <sys/stat.h>
#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/session/session.hpp"
#include "small_session.hpp"

namespace fs = std::filesystem;
using Catch::Approx;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;
using fastweights::CallKind;
using fastweights::Cancelled;
using fastweights::Error;
using fastweights::FileError;
using fastweights::LogCall;
using fastweights::Session;
using fastweights::StateMismatch;
using fastweights::test::FileSizeLimit;
using fastweights::test::get;
using fastweights::test::Model;
using fastweights::test::names_in;
using fastweights::test::noise;
using fastweights::test::put;
using fastweights::test::random_model;
using fastweights::test::same_bits;
using fastweights::test::small_config;
using fastweights::test::TemporaryFolder;

namespace {

/// Root mean square of the difference over that of `b`, the worst of all tensors.
double distance(const Session& a, const Session& b) {
  const auto left = a.state();
  const auto right = b.state();
  double worst = 0.0;
  for (std::size_t i = 0; i < left.size(); ++i) {
    const at::Tensor x = left[i].second.to(at::kDouble);
    const at::Tensor y = right[i].second.to(at::kDouble);
    worst = std::max(worst, ((x - y).norm() / y.norm().clamp_min(1e-30)).item<double>());
  }
  return worst;
}

}  // namespace

// ---- reading -----------------------------------------------------------------------------------

TEST_CASE("a fresh session predicts its first byte uniformly", "[session]") {
  const Session session(random_model());
  CHECK(session.position() == 0);
  CHECK(at::equal(session.logits(), at::zeros({256})));
  CHECK(session.score("x") == Approx(8.0).epsilon(1e-6));
  CHECK(session.token_bits("").empty());
  CHECK_THROWS_AS(session.score(""), Error);
}

TEST_CASE("a session is a function of model and log", "[session]") {
  const Model model = random_model();
  const std::string text = noise(700);
  Session a(model, {.piece = 64});
  Session b(model, {.piece = 64});
  a.read(text);
  a.read("and more");
  b.read(text);
  b.read("");  // leaves no trace
  CHECK_FALSE(same_bits(a, b));
  b.read("and more");
  CHECK(same_bits(a, b));
  CHECK(a.log() == b.log());
  CHECK(a.position() == 708);
  REQUIRE(a.log().calls().size() == 2);
  CHECK(a.log().calls()[0] == LogCall{CallKind::kRead, 700, {}});
  const std::string read_last = "and more";
  const std::vector<std::int64_t> last(read_last.begin(), read_last.end());
  CHECK(a.log().tokens(700, 708) == last);
}

TEST_CASE("where calls end changes rounding at most", "[session]") {
  const Model model = random_model();
  const std::string text = noise(640);
  Session whole(model, {.piece = 64});
  whole.read(text);

  Session on_pieces(model, {.piece = 64});
  on_pieces.read(text.substr(0, 128));
  on_pieces.read(text.substr(128));
  CHECK(same_bits(whole, on_pieces));

  Session elsewhere(model, {.piece = 100});
  for (const auto& [begin, size] : {std::pair{0, 1}, {1, 333}, {334, 306}}) {
    elsewhere.read(text.substr(begin, size));
  }
  CHECK(distance(elsewhere, whole) < 1e-4);
}

TEST_CASE("scores are those of reading, and leave the session alone", "[session]") {
  Session session(random_model(), {.piece = 50});
  session.read(noise(130, 5));
  const Session before = session;
  const std::string text = noise(333, 7);

  const std::vector<float> bits = session.token_bits(text);
  const double score = session.score(text);
  CHECK(same_bits(session, before));
  CHECK(session.log() == before.log());
  REQUIRE(bits.size() == text.size());
  CHECK(score == Approx(std::accumulate(bits.begin(), bits.end(), 0.0) / 333.0).epsilon(1e-12));

  Session read_only = before;
  read_only.read(text);
  CHECK(session.read_and_score(text) == bits);
  CHECK(same_bits(session, read_only));
  CHECK(session.log() == read_only.log());
}

TEST_CASE("bits are those of the model's own logits", "[session]") {
  const Model model = random_model();
  const std::string text = "a short text, read at once";
  const std::vector<float> bits = Session(model).token_bits(text);
  const std::vector<std::int64_t> ids(text.begin(), text.end());
  const at::Tensor tokens = at::tensor(ids).unsqueeze(0);
  const at::NoGradGuard guard;
  const at::Tensor logits = model->forward(tokens, model->initial_state(1)).logits;
  const at::Tensor log_p = at::log_softmax(logits[0].to(at::kDouble), 1);
  for (std::size_t i = 1; i < ids.size(); ++i) {
    const double expected =
        -log_p[static_cast<int64_t>(i) - 1][ids[i]].item<double>() / std::log(2.0);
    CHECK(bits[i] == Approx(expected).epsilon(1e-4));
  }
}

TEST_CASE("a session remembers beyond its attention's reach", "[session]") {
  Session session(random_model());
  session.read("one beginning" + noise(300));
  Session other(random_model());
  other.read("another start" + noise(300));
  CHECK_FALSE(at::equal(session.logits(), other.logits()));
}

TEST_CASE("memory does not grow with what was read", "[session]") {
  Session session(random_model(), {.piece = 64});
  const auto bytes = [&] {
    std::size_t sum = 0;
    for (const auto& [name, tensor] : session.state()) sum += tensor.nbytes();
    return sum;
  };
  session.read("x");
  const std::size_t before = bytes();
  session.read(noise(5000));
  CHECK(bytes() == before);
  CHECK(session.log().packed().size() == 5001);
}

TEST_CASE("a stopped read holds the pieces that were done", "[session]") {
  const Model model = random_model();
  const std::string text = noise(500);
  Session session(model, {.piece = 64});
  std::vector<std::int64_t> seen;
  const auto stop_at_192 = [&](std::int64_t done, std::int64_t total) {
    CHECK(total == 500);
    seen.push_back(done);
    return done < 192;
  };
  CHECK_THROWS_AS(session.read(text, stop_at_192), Cancelled);
  CHECK(seen == std::vector<std::int64_t>{64, 128, 192});

  Session expected(model, {.piece = 64});
  expected.read(text.substr(0, 192));
  CHECK(same_bits(session, expected));
  CHECK(session.log() == expected.log());

  const auto fail = [](std::int64_t, std::int64_t) -> bool { throw std::runtime_error("mine"); };
  CHECK_THROWS_WITH(session.read_and_score(text, fail), "mine");
  CHECK(session.position() == 256);
  CHECK_THROWS_AS(session.score(text, [](auto, auto) { return false; }), Cancelled);
  CHECK(session.position() == 256);
  CHECK_NOTHROW(session.read("short", [](auto, auto) { return false; }));  // was done already
}

TEST_CASE("what a session cannot run is refused", "[session]") {
  CHECK_THROWS_AS(Session(nullptr), Error);
  CHECK_THROWS_AS(Session(random_model(), {.piece = 0}), Error);
  const auto training = std::make_shared<fastweights::nn::LanguageModelImpl>(small_config());
  CHECK_THROWS_MATCHES(Session(training), Error, MessageMatches(ContainsSubstring("evaluation")));
  auto config = small_config();
  config.vocabulary_size = 300;
  CHECK_THROWS_MATCHES(Session(random_model(1, config)), Error,
                       MessageMatches(ContainsSubstring("300")));
}

TEST_CASE("models of one store only run too", "[session]") {
  const std::string text = noise(200);
  for (const bool memory : {false, true}) {
    auto config = small_config();
    config.memory = memory;
    config.attention = !memory;
    Session session(random_model(1, config), {.piece = 64});
    session.read(text);
    CHECK(session.write({.max_tokens = 5}).size() == 5);
    CHECK(session.position() == 205);
  }
}

// ---- writing -----------------------------------------------------------------------------------

TEST_CASE("writing is repeatable and learned", "[session]") {
  const Model model = random_model();
  Session a(model);
  a.read("To begin with");
  Session b = a;
  const std::string text = a.write({.max_tokens = 40});
  CHECK(text.size() == 40);
  CHECK(b.write({.max_tokens = 40}) == text);
  CHECK(same_bits(a, b));
  CHECK(a.position() == 53);
  REQUIRE(a.log().calls().size() == 2);
  CHECK(a.log().calls()[1] == LogCall{CallKind::kWritten, 40, {}});
  CHECK(a.write({.max_tokens = 40}) != text);  // the generator went on

  Session reader(model);
  reader.read("To begin with" + text);
  CHECK((reader.logits() - b.logits()).norm().item<double>() <
        1e-4 * b.logits().norm().item<double>());
}

TEST_CASE("two writes are one", "[session]") {
  const Model model = random_model();
  Session whole(model, {.seed = 9});
  Session parts(model, {.seed = 9});
  const std::string text = whole.write({.max_tokens = 30});
  std::string in_parts = parts.write({.max_tokens = 7});
  in_parts += parts.write({.max_tokens = 23});
  CHECK(in_parts == text);
  CHECK(same_bits(whole, parts));
}

TEST_CASE("a seed decides what is written", "[session]") {
  const Session start(random_model());
  const auto written = [&](std::optional<std::uint64_t> seed) {
    Session session = start;
    return session.write({.max_tokens = 20, .seed = seed});
  };
  CHECK(written(3) == written(3));
  CHECK(written(3) != written(4));
  CHECK(written(0) == written({}));

  Session session = start;
  session.write({.max_tokens = 2, .seed = 3});
  CHECK(session.log().calls()[0].seed == 3);
  CHECK(at::equal(session.state().back().second, at::tensor({3, 2}, at::kLong)));
}

TEST_CASE("writing stops where it is told to", "[session]") {
  const Session start(random_model());
  const auto greedy = [&](fastweights::WriteOptions options) {
    Session session = start;
    options.temperature = 0.7;
    const std::string text = session.write(options);
    CHECK(session.position() == std::ssize(text));
    return text;
  };
  const std::string text = greedy({.max_tokens = 60});
  const std::string stop = text.substr(20, 3);
  const std::string stopped = greedy({.max_tokens = 60, .stop = {"never this long a text", stop}});
  CHECK(stopped == text.substr(0, text.find(stop) + 3));

  std::string seen;
  const auto five = [&](std::string_view bytes) { return (seen += bytes).size() < 5; };
  CHECK(greedy({.max_tokens = 60, .on_token = five}) == text.substr(0, 5));
  CHECK(seen == text.substr(0, 5));
  CHECK(greedy({.max_tokens = 0}).empty());
}

TEST_CASE("a callback that throws leaves what was written", "[session]") {
  const Model model = random_model();
  Session session(model);
  int calls = 0;
  const auto third = [&](std::string_view) -> bool {
    if (++calls == 3) throw std::runtime_error("enough");
    return true;
  };
  CHECK_THROWS_WITH(session.write({.max_tokens = 10, .on_token = third}), "enough");
  Session expected(model);
  expected.write({.max_tokens = 3});
  CHECK(same_bits(session, expected));
  CHECK(session.log() == expected.log());
}

TEST_CASE("impossible options leave the session alone", "[session]") {
  Session session(random_model());
  CHECK_THROWS_AS(session.write({.max_tokens = -1}), Error);
  CHECK_THROWS_AS(session.write({.temperature = -1.0}), Error);
  CHECK_THROWS_AS(session.write({.top_p = 0.0}), Error);
  CHECK_THROWS_AS(session.write({.stop = {""}}), Error);
  CHECK(session.position() == 0);
}

TEST_CASE("copies are independent", "[session]") {
  Session session(random_model());
  session.read(noise(100));
  Session copy = session;
  copy.write({.max_tokens = 5});
  Session expected(random_model());
  expected.read(noise(100));
  CHECK(same_bits(session, expected));
  CHECK_FALSE(same_bits(session, copy));
  session.state()[0].second.fill_(7.0);  // what state() returns is nobody else's
  CHECK(same_bits(session, expected));
}

TEST_CASE("sessions on many threads share one model", "[session]") {
  const Model model = random_model();
  const auto run = [&](std::uint32_t seed) {
    at::set_num_threads(1);
    Session session(model, {.piece = 64, .seed = seed});
    session.read(noise(500, seed));
    session.write({.max_tokens = 30});
    session.read(noise(100, seed + 1));
    return session;
  };
  const int threads = at::get_num_threads();
  std::vector<Session> alone;
  for (std::uint32_t seed = 0; seed < 6; ++seed) alone.push_back(run(seed));
  std::vector<Session> together(6, Session(model));
  std::vector<std::thread> workers;
  for (std::uint32_t seed = 0; seed < 6; ++seed) {
    workers.emplace_back([&, seed] { together[seed] = run(seed); });
  }
  for (std::thread& worker : workers) worker.join();
  at::set_num_threads(threads);
  for (std::size_t i = 0; i < 6; ++i) CHECK(same_bits(alone[i], together[i]));
}

// ---- state files -------------------------------------------------------------------------------

TEST_CASE("a saved session goes on as if it had never been saved", "[session]") {
  const TemporaryFolder folder;
  const Model model = random_model();
  Session session(model, {.piece = 70, .seed = 5});
  session.read(noise(400));
  session.write({.max_tokens = 11});
  session.write({.max_tokens = 4, .seed = 0xFFFFFFFFFFFFFFFFU});
  session.save(folder / "a.fwstate");

  Session resumed = Session::load(folder / "a.fwstate", random_model());  // equal, not the same
  CHECK(same_bits(resumed, session));
  CHECK(resumed.log() == session.log());
  CHECK(resumed.write({.max_tokens = 20}) == session.write({.max_tokens = 20}));
  CHECK(resumed.read_and_score(noise(200, 3)) == session.read_and_score(noise(200, 3)));
  CHECK(same_bits(resumed, session));
  resumed.save(folder / "b.fwstate");
  session.save(folder / "a.fwstate");
  CHECK(get(folder / "a.fwstate") == get(folder / "b.fwstate"));
}

TEST_CASE("a fresh session can be saved", "[session]") {
  const TemporaryFolder folder;
  const Session session(random_model());
  session.save(folder / "fresh.fwstate");
  CHECK(same_bits(Session::load(folder / "fresh.fwstate", random_model()), session));
}

TEST_CASE("only its owner can read a state file", "[session]") {
  const TemporaryFolder folder;
  const fs::path path = folder / "a.fwstate";
  put(path, "anybody can read this");
  fs::permissions(path, fs::perms(0644));
  Session(random_model()).save(path);
  struct stat status{};
  REQUIRE(stat(path.c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0600);
  CHECK(names_in(folder.path()).size() == 1);
}

/// A message that names the file and says why.
auto says(const std::string& why) {
  return MessageMatches(Catch::Matchers::Matches(".*a\\.fwstate.*" + why + ".*"));
}

TEST_CASE("a file that is not this session's is refused", "[session]") {
  const TemporaryFolder folder;
  const fs::path path = folder / "a.fwstate";
  Session session(random_model());
  session.read(noise(100));
  session.save(path);
  const std::string bytes = get(path);
  const auto load = [&](const std::string& content) {
    put(path, content);
    return Session::load(path, random_model());
  };

  CHECK_THROWS_MATCHES(Session::load(path, random_model(2)), StateMismatch,
                       says("belongs to another model"));
  auto config = small_config();
  config.layers = 1;
  CHECK_THROWS_MATCHES(Session::load(path, random_model(1, config)), StateMismatch,
                       says("belongs to another model"));
  CHECK_THROWS_MATCHES(load(bytes.substr(0, bytes.size() / 2)), FileError, says("cut short"));
  std::string altered = bytes;
  altered[bytes.size() / 2] ^= 1;
  CHECK_THROWS_MATCHES(load(altered), FileError, says("altered"));
  CHECK_THROWS_MATCHES(load("some other file"), FileError, says("no fastweights state file"));
  CHECK_THROWS_MATCHES(load(""), FileError, says("empty"));
  fs::remove(path);
  CHECK_THROWS_MATCHES(Session::load(path, random_model()), FileError, says(""));
  CHECK_THROWS_AS(Session::load(folder / ".", random_model()), FileError);
  put(path, bytes);
  CHECK_NOTHROW(Session::load(path, random_model()));
}

TEST_CASE("a full disk leaves the old file whole", "[session]") {
  const TemporaryFolder folder;
  const fs::path path = folder / "a.fwstate";
  Session session(random_model());
  session.save(path);
  const std::string before = get(path);
  session.read(noise(300));
  {
    const FileSizeLimit limit(before.size() / 2);
    CHECK_THROWS_MATCHES(session.save(path), FileError,
                         MessageMatches(ContainsSubstring("a.fwstate")));
  }
  CHECK(get(path) == before);
  CHECK(names_in(folder.path()).size() == 1);
  CHECK_THROWS_AS(session.save(folder / "no such folder" / "a.fwstate"), FileError);
  session.save(path);
  CHECK(same_bits(Session::load(path, random_model()), session));
}
