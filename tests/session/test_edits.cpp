#include <malloc.h>
#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/session/session.hpp"
#include "small_session.hpp"

// Going back: what a session is after an edit of its log, bit for bit.

using Catch::Matchers::ContainsSubstring;
using fastweights::CallKind;
using fastweights::Cancelled;
using fastweights::Error;
using fastweights::Session;
using fastweights::SessionLog;
using fastweights::SessionOptions;
using fastweights::test::Model;
using fastweights::test::noise;
using fastweights::test::OneThread;
using fastweights::test::random_model;
using fastweights::test::same_bits;
using fastweights::test::small_config;
using fastweights::test::TemporaryFolder;

namespace {

constexpr std::int64_t kPiece = 16;

/// A model whose memories have that rule; "fast_head" has a memory at the head beside gated ones.
Model model_of(const std::string& rule, double beta_max = 1.5) {
  auto config = small_config();
  config.fast_head = rule == "fast_head";
  config.memory_rule = config.fast_head ? "gated_delta_rule" : rule;
  config.beta_max = beta_max;
  return random_model(1, config);
}

/// A store that soon drops what it has: keys of the last 256 to 512 tokens.
fastweights::ExactStoreOptions small_store() {
  fastweights::ExactStoreOptions options;
  options.match.shortest = 2;
  options.neighbours.count = 8;
  options.neighbours.bytes = 2 * 256 * 65;
  return options;
}

/// The same in fp64, which sessions run by its modules.
Model wide(const Model& model) {
  auto copy = std::static_pointer_cast<fastweights::nn::LanguageModelImpl>(model->clone());
  copy->to(at::kDouble);
  copy->eval();
  for (at::Tensor& parameter : copy->parameters()) parameter.requires_grad_(false);
  return copy;
}

using Named = std::map<std::string, at::Tensor>;

Named named(const Session& session) {
  Named out;
  for (const auto& [name, tensor] : session.state()) out[name] = tensor;
  return out;
}

// ---- an oracle ---------------------------------------------------------------------------------

/// A token as a user sees it: what it is, which call brought it, how strongly it is learned.
struct Token {
  std::int64_t id = 0;
  int call = 0;
  bool written = false;
  float strength = 1.0F;
};
using Text = std::vector<Token>;

void add(Text& text, std::string_view bytes, int call, bool written) {
  for (const char c : bytes) {
    text.push_back({static_cast<unsigned char>(c), call, written, 1.0F});
  }
}

/// A store driven by hand: it sees each token with what the model said before it.
class StoreByHand {
 public:
  StoreByHand(const Model& model, const fastweights::ExactStoreOptions& options)
      : store_(model->config().width, 256, options),
        hidden_(at::zeros({1, model->config().width})),
        logits_(at::zeros({1, 256})) {}

  void read(const at::Tensor& ids, const at::Tensor& strength, const at::Tensor& hidden,
            const at::Tensor& logits) {
    const at::Tensor all_hidden = at::cat({hidden_, hidden.to(at::kFloat)});
    const at::Tensor all_logits = at::cat({logits_, logits.to(at::kFloat)});
    const auto count = ids.numel();
    const auto span = [](const at::Tensor& tensor) {
      return std::span(tensor.const_data_ptr<float>(), static_cast<std::size_t>(tensor.numel()));
    };
    const at::Tensor before = all_hidden.slice(0, 0, count);
    const at::Tensor said = all_logits.slice(0, 0, count);
    store_.read({{ids.const_data_ptr<std::int64_t>(), static_cast<std::size_t>(count)},
                 span(before),
                 span(said),
                 span(strength)},
                {}, fastweights::core::serial_executor());
    hidden_ = all_hidden.slice(0, count).clone();
    logits_ = all_logits.slice(0, count).clone();
    mixed_ = at::empty({256});
    const auto recall = store_.recall(span(hidden_), fastweights::core::serial_executor());
    store_.mix(recall, span(logits_), {mixed_.mutable_data_ptr<float>(), 256});
  }

  const at::Tensor& log_p() const { return mixed_; }
  const fastweights::ExactStore& store() const { return store_; }

 private:
  fastweights::ExactStore store_;
  at::Tensor hidden_, logits_, mixed_;
};

/// A plain loop over model.forward, which knows nothing of sessions: what the state must be after a
/// text of which written tokens are processed one by one while their strength is 1, and everything
/// else in pieces that are counted from where a call, or a run of other strengths in a written
/// call, begins.
Named play(const Model& model, const Text& text,
           const std::optional<fastweights::ExactStoreOptions>& options = {}) {
  const c10::InferenceMode guard;
  std::optional<StoreByHand> store;
  if (options) store.emplace(model, *options);
  auto state = model->initial_state(1);
  at::Tensor logits = at::zeros({256});
  for (std::size_t begin = 0; begin < text.size();) {
    const auto stepwise = [&](std::size_t i) { return text[i].written && text[i].strength == 1; };
    std::size_t end = begin + 1;
    const auto joins = [&](std::size_t i) {
      return text[i].call == text[begin].call && stepwise(i) == stepwise(begin);
    };
    while (end < text.size() && joins(end)) ++end;
    const std::size_t size = stepwise(begin) ? 1 : kPiece;
    for (std::size_t at = begin; at < end; at += size) {
      const std::size_t count = std::min(size, end - at);
      at::Tensor ids = at::empty({1, static_cast<std::int64_t>(count)}, at::kLong);
      at::Tensor strength = at::empty({1, static_cast<std::int64_t>(count)});
      for (std::size_t i = 0; i < count; ++i) {
        ids[0][static_cast<std::int64_t>(i)] = text[at + i].id;
        strength[0][static_cast<std::int64_t>(i)] = text[at + i].strength;
      }
      at::Tensor hidden;
      auto output =
          stepwise(begin)
              ? model->forward(ids, state.clone(), {.in_place = true, .hidden = &hidden})
              : model->forward(ids, state, {.write_strength = strength, .hidden = &hidden});
      state = std::move(output.state);
      logits = output.logits[0][-1].to(at::kFloat).clone();
      if (store) {
        store->read(ids, strength, hidden[0], output.logits[0]);
        logits = store->log_p();
      }
    }
    begin = end;
  }
  Named out;
  for (const auto& [name, tensor] : state.tensors()) out[name] = tensor;
  out["logits"] = logits;
  if (!store) return out;
  for (const auto& stored : store->store().tensors()) {
    at::Tensor bytes = at::empty({static_cast<std::int64_t>(stored.bytes.size())}, at::kByte);
    std::memcpy(bytes.data_ptr(), stored.bytes.data(), stored.bytes.size());
    out[stored.name] = bytes;
  }
  return out;
}

/// Of a store's tensors the bytes count.
bool same(const std::string& name, const at::Tensor& mine, const at::Tensor& expected) {
  if (!name.starts_with("store.")) return at::equal(mine, expected);
  return at::equal(mine.contiguous().view({-1}).view(at::kByte), expected);
}

void check_state(const Session& session, const Named& expected) {
  const Named mine = named(session);
  for (const auto& [name, tensor] : expected) {
    INFO(name);
    CHECK(at::equal(mine.at(name), tensor));
  }
}

}  // namespace

// ---- rollback ----------------------------------------------------------------------------------

TEST_CASE("rolled back to any token, a session is one that went no further", "[edits]") {
  const OneThread one_thread;
  const auto rule = GENERATE(as<std::string>(), "gated_delta_rule", "delta_rule", "fast_head");
  const std::int64_t journal_bytes = GENERATE(0, 100000, 64 << 20);
  CAPTURE(rule, journal_bytes);
  const Model model = model_of(rule);
  const SessionOptions options{.piece = kPiece, .seed = 3, .journal_bytes = journal_bytes};
  const std::string first = noise(40);
  const std::string last = noise(35, 2);
  const auto drive = [&](std::int64_t end) {
    Session session(model, options);
    session.read(first.substr(0, static_cast<std::size_t>(std::min<std::int64_t>(end, 40))));
    if (end > 40) session.write({.max_tokens = std::min<std::int64_t>(end - 40, 70), .seed = 8});
    if (end > 110) session.read(last.substr(0, static_cast<std::size_t>(end - 110)));
    return session;
  };
  const Session whole = drive(145);
  Session stepping = whole;  // one that goes back and back
  for (std::int64_t end = 145; end >= 0; end -= (end % 16 < 2 || end % 8 == 0) ? 1 : 3) {
    INFO("to " << end);
    Session expected = drive(end);
    Session session = whole;
    session.rollback(end);
    stepping.rollback(end);
    REQUIRE(same_bits(session, expected));
    REQUIRE(same_bits(stepping, expected));
    REQUIRE((session.log() == expected.log()));
    if (end % 16 != 0) continue;
    CHECK(session.write({.max_tokens = 5}) == expected.write({.max_tokens = 5}));
    session.read("and on");
    expected.read("and on");
    CHECK(same_bits(session, expected));
  }
}

TEST_CASE("a mark is a place to go back to until it is passed", "[edits]") {
  Session session(random_model(), {.piece = kPiece});
  const auto origin = session.mark();
  session.read(noise(50));
  const Session before = session;
  const auto mark = session.mark();
  session.write({.max_tokens = 30});
  const auto later = session.mark();
  CHECK(session.position(later) == 80);
  CHECK(session.marks().size() == 3);
  const Session fork = session.fork();
  session.rollback(mark);
  CHECK(same_bits(session, before));
  CHECK(session.position() == 50);
  CHECK_NOTHROW(session.rollback(mark));
  CHECK_THROWS_WITH(session.rollback(later), ContainsSubstring("rolled back to before it"));
  CHECK_THROWS_WITH(session.feedback(later, 1.0F), ContainsSubstring("rolled back to before it"));
  CHECK(fork.position(later) == 80);
  Session other(random_model());
  CHECK_THROWS_WITH(other.rollback(mark), ContainsSubstring("none of this session's"));
  CHECK_THROWS_WITH(session.rollback(51), ContainsSubstring("must be in [0, 50], got 51"));
  CHECK_THROWS_WITH(session.rollback(-1), ContainsSubstring("must be in [0, 50], got -1"));
  CHECK(session.position() == 50);
  session.rollback(origin);
  CHECK(same_bits(session, Session(random_model())));
}

TEST_CASE("what is committed stays", "[edits]") {
  Session session(random_model(), {.piece = kPiece, .seed = 4});
  session.read(noise(50));
  const auto mark = session.mark();
  session.write({.max_tokens = 20, .seed = 6});
  Session plain = session;
  session.commit();
  CHECK(same_bits(session, plain));
  CHECK(session.position() == 70);
  CHECK(session.log().size() == 0);
  CHECK_THROWS_WITH(session.rollback(mark), ContainsSubstring("commit()"));
  CHECK_THROWS_WITH(session.rollback(69), ContainsSubstring("before 70 is committed"));
  CHECK(session.report().read == 50);
  CHECK(session.report().written == 20);
  CHECK(session.report().committed == 70);
  session.read(noise(30, 5));
  plain.read(noise(30, 5));
  session.write({.max_tokens = 10});
  plain.write({.max_tokens = 10});
  CHECK(same_bits(session, plain));
  session.rollback(75);
  plain.rollback(75);
  CHECK(same_bits(session, plain));
  session.rollback(70);
  plain.rollback(70);
  CHECK(same_bits(session, plain));
  CHECK_THROWS_AS(Session::from_log(random_model(), session.log()), Error);
}

// ---- feedback ----------------------------------------------------------------------------------

TEST_CASE("feedback is the strength of a span, and nothing else", "[edits]") {
  const OneThread one_thread;
  const auto rule = GENERATE(as<std::string>(), "gated_delta_rule", "delta_rule", "fast_head");
  CAPTURE(rule);
  const Model model = wide(model_of(rule));
  Session session(model, {.piece = kPiece});
  REQUIRE_FALSE(session.fused());
  const std::string first = noise(45);
  const std::string last = noise(40, 2);
  session.read(first);
  const std::string written = session.write({.max_tokens = 50});
  session.read(last);
  Text text;
  add(text, first, 0, false);
  add(text, written, 1, true);
  add(text, last, 2, false);
  check_state(session, play(model, text));
  const Session before = session;

  struct Span {
    std::int64_t begin, end;
    float strength;
  };
  for (const auto& [begin, end, strength] :
       {Span{0, 45, 0.0F}, Span{20, 27, 0.5F}, Span{50, 81, 1.5F}, Span{60, 61, 0.0F},
        Span{40, 100, 2.0F}, Span{95, 135, 0.25F}, Span{0, 135, 0.0F}, Span{70, 70, 0.0F},
        Span{3, 130, 1.0F}, Span{0, 135, 1.0F}}) {
    INFO("[" << begin << ", " << end << ") " << strength);
    session.feedback(begin, end, strength);
    for (std::int64_t i = begin; i < end; ++i) {
      text[static_cast<std::size_t>(i)].strength = strength;
    }
    check_state(session, play(model, text));
  }
  CHECK(same_bits(session, before));
  CHECK((session.log() == before.log()));
}

TEST_CASE("runs of strengths that grow together are one", "[edits]") {
  const OneThread one_thread;
  const Model model = wide(model_of("gated_delta_rule"));
  Session session(model, {.piece = kPiece});
  const std::string written = session.write({.max_tokens = 60});
  Text text;
  add(text, written, 0, true);
  const auto set = [&](std::int64_t begin, std::int64_t end, float strength) {
    session.feedback(begin, end, strength);
    for (auto i = begin; i < end; ++i) text[static_cast<std::size_t>(i)].strength = strength;
    check_state(session, play(model, text));
  };
  set(10, 20, 0.5F);  // leaves a checkpoint at 20, which is inside a piece of the longer run
  set(20, 35, 0.5F);
  set(40, 50, 1.5F);
  session.revoke(35, 40);
  text.erase(text.begin() + 35, text.begin() + 40);
  check_state(session, play(model, text));
  set(10, 45, 1.0F);
}

TEST_CASE("without strength a text passes the window and leaves no write", "[edits]") {
  const auto rule = GENERATE(as<std::string>(), "gated_delta_rule", "delta_rule", "fast_head");
  Session session(model_of(rule), {.piece = kPiece});
  session.read(noise(40));
  const Named before = named(session);
  const auto mark = session.mark();
  session.read(noise(30, 2));
  session.write({.max_tokens = 20});
  const Session learned = session;
  session.feedback(mark, 0.0F);
  const Named after = named(session);
  for (const auto& [name, tensor] : before) {
    INFO(name);
    const bool memory = name.ends_with("memory.state") || name == "head.state";
    CHECK(at::equal(after.at(name), tensor) == memory);
  }
  CHECK(at::equal(after.at("generator"), named(learned).at("generator")));
  session.feedback(mark, 1.0F);
  CHECK(same_bits(session, learned));
  CHECK_THROWS_WITH(session.feedback(mark, 2.1F), ContainsSubstring("[0, 2], got 2.1"));
  CHECK_THROWS_WITH(session.feedback(mark, std::numeric_limits<float>::quiet_NaN()),
                    ContainsSubstring("[0, 2]"));
  CHECK_THROWS_WITH(session.feedback(50, 49, 1.0F), ContainsSubstring("must not end before"));
  CHECK_THROWS_WITH(session.feedback(50, 91, 1.0F), ContainsSubstring("[0, 90], got 91"));
  CHECK(same_bits(session, learned));
}

TEST_CASE("strengths beyond the stable range are counted", "[edits]") {
  Session session(model_of("gated_delta_rule", 2.0), {.piece = kPiece});
  session.read(noise(60));
  CHECK(session.report().limited_writes == 0);
  session.feedback(10, 50, 2.0F);
  const std::int64_t limited = session.report().limited_writes;
  CHECK(limited > 0);
  CHECK(limited <= 40 * 2 * 2);  // tokens, layers, heads
  session.read(noise(10, 2));
  CHECK(session.report().limited_writes == limited);
  session.feedback(0, 60, 2.0F);
  CHECK(session.report().limited_writes > limited);
  session.feedback(10, 50, 2.0F);  // sets, does not compose
  session.feedback(0, 10, 1.0F);
  session.feedback(50, 60, 1.0F);
  CHECK(session.report().limited_writes == limited);
  session.feedback(0, 60, 1.0F);
  CHECK(session.report().limited_writes == 0);
}

TEST_CASE("a correction is feedback, and a better text learned in its place", "[edits]") {
  Session session(random_model(), {.piece = kPiece});
  session.read("A question?");
  const auto mark = session.mark();
  session.write({.max_tokens = 20});
  Session expected = session;
  expected.feedback(mark, 0.0F);
  expected.read("The better answer.");
  const Session before = session;
  CHECK_THROWS_AS(
      session.correct(mark, noise(40), 0.0F, [](auto, auto total) { return total != 40; }),
      Cancelled);
  CHECK(same_bits(session, before));
  CHECK((session.log() == before.log()));
  session.correct(mark, "The better answer.");
  CHECK(same_bits(session, expected));
  CHECK((session.log() == expected.log()));
  CHECK(session.position(mark) == 11);
}

// ---- revoke ------------------------------------------------------------------------------------

TEST_CASE("after revoke a session never read the span", "[edits]") {
  const Model model = random_model();
  const std::string a = noise(50);
  const std::string b = noise(45, 2);
  Session session(model, {.piece = kPiece});
  session.read(a);
  const auto between = session.mark();
  session.read(b);
  const auto end = session.mark();
  for (const auto& span : {std::pair{0, 1},
                           {10, 20},
                           {16, 32},
                           {0, 50},
                           {40, 60},
                           {50, 95},
                           {94, 95},
                           {0, 95},
                           {30, 30}}) {
    const int from = span.first;  // clang 14 does not let a lambda have a structured binding
    const int to = span.second;
    INFO("[" << from << ", " << to << ")");
    Session revoked = session;
    revoked.revoke(from, to);
    Session expected(model, {.piece = kPiece});
    const auto kept = [&](const std::string& text, int start) {
      std::string out;
      for (int i = 0; i < static_cast<int>(text.size()); ++i) {
        if (start + i < from || start + i >= to) out += text[static_cast<std::size_t>(i)];
      }
      return out;
    };
    expected.read(kept(a, 0));
    expected.read(kept(b, 50));
    CHECK(same_bits(revoked, expected));
    CHECK((revoked.log() == expected.log()));
    CHECK(revoked.position(end) == 95 - (to - from));
    CHECK(revoked.position(between) == (from >= 50 ? 50 : std::max(from, 50 - (to - from))));
  }
  Session twice = session;
  twice.revoke(between, end);
  Session only_a(model, {.piece = kPiece});
  only_a.read(a);
  CHECK(same_bits(twice, only_a));
  CHECK_THROWS_AS(session.revoke(20, 10), Error);
  CHECK_THROWS_AS(session.revoke(0, 96), Error);
}

// ---- everything together -----------------------------------------------------------------------

namespace {

/// A session and what it must be, driven by random calls.
class Driver {
 public:
  Driver(Model model, std::uint64_t seed, std::int64_t journal_bytes,
         const std::optional<fastweights::ExactStoreOptions>& store = {})
      : model_(std::move(model)),
        random_(seed),
        session_(model_,
                 {.piece = kPiece, .seed = seed, .journal_bytes = journal_bytes, .store = store}) {}

  Session& session() { return session_; }
  const Text& text() const { return text_; }

  void step() {
    const auto end = static_cast<std::int64_t>(text_.size());
    switch (end < 30 ? below(2) : below(8)) {
      case 0: return read();
      case 1: return write();
      case 2: return rollback(end - below(end < 150 ? 20 : 120));
      case 3:
      case 4: return feedback();
      case 5: return revoke();
      case 6: return reload();
      default: return part();
    }
  }

  /// Copies that went no further, and what they must be.
  const std::vector<std::pair<Session, Named>>& parted() const { return parted_; }

 private:
  std::int64_t below(std::int64_t limit) {
    return std::uniform_int_distribution<std::int64_t>(0, limit - 1)(random_);
  }

  void read() {
    const std::string bytes =
        noise(static_cast<std::size_t>(1 + below(45)), static_cast<std::uint32_t>(1 + below(1000)));
    session_.read(bytes);
    add(text_, bytes, calls_++, false);
  }

  void write() {
    const std::optional<std::uint64_t> seed =
        below(2) == 0 ? std::nullopt : std::optional<std::uint64_t>(below(100));
    const std::string bytes = session_.write({.max_tokens = 1 + below(30), .seed = seed});
    add(text_, bytes, calls_++, true);
  }

  void rollback(std::int64_t end) {
    end = std::max<std::int64_t>(end, 0);
    session_.rollback(end);
    text_.resize(static_cast<std::size_t>(end));
  }

  std::pair<std::int64_t, std::int64_t> span() {
    const auto end = static_cast<std::int64_t>(text_.size());
    const std::int64_t begin = below(end);
    return {begin, std::min(end, begin + below(60))};
  }

  void feedback() {
    const auto [begin, end] = span();
    const float strength = std::vector<float>{0.0F, 0.5F, 1.0F, 1.0F, 1.5F}[below(5)];
    session_.feedback(begin, end, strength);
    for (auto i = begin; i < end; ++i) text_[static_cast<std::size_t>(i)].strength = strength;
  }

  void revoke() {
    const auto [begin, end] = span();
    session_.revoke(begin, end);
    text_.erase(text_.begin() + begin, text_.begin() + end);
  }

  void reload() {
    const TemporaryFolder folder;
    session_.save(folder / "a.fwstate");
    session_ = Session::load(folder / "a.fwstate", model_);
  }

  void part() { parted_.emplace_back(session_, named(session_)); }

  Model model_;
  std::mt19937_64 random_;
  Session session_;
  Text text_;
  int calls_ = 0;
  std::vector<std::pair<Session, Named>> parted_;
};

}  // namespace

TEST_CASE("a session is what a plain loop over the model gives, whatever was called", "[edits]") {
  const OneThread one_thread;
  const auto rule =
      GENERATE(as<std::string>(), "gated_delta_rule", "delta_rule", "fast_head", "exact_store");
  const std::uint64_t seed = GENERATE(range(1, 4));
  const std::int64_t journal_bytes = seed == 1 ? 0 : seed == 2 ? 500000 : 64 << 20;
  CAPTURE(rule, seed);
  const bool with_store = rule == "exact_store";
  const auto store = with_store ? std::optional(small_store()) : std::nullopt;
  const Model model = wide(model_of(with_store ? "fast_head" : rule));
  Driver driver(model, seed, journal_bytes, store);
  for (int step = 0; step < 30; ++step) {
    INFO("step " << step);
    driver.step();
    const Named expected = play(model, driver.text(), store);
    for (const auto& [name, tensor] : expected) {
      INFO(name);
      REQUIRE(same(name, named(driver.session()).at(name), tensor));
    }
  }
}

TEST_CASE("equal logs are equal sessions, on the fused kernels too", "[edits]") {
  const OneThread one_thread;
  const auto rule =
      GENERATE(as<std::string>(), "gated_delta_rule", "delta_rule", "fast_head", "exact_store");
  const std::uint64_t seed = GENERATE(range(11, 14));
  const std::int64_t journal_bytes = seed == 11 ? 0 : seed == 12 ? 100000 : 64 << 20;
  CAPTURE(rule, seed);
  const bool with_store = rule == "exact_store";
  const auto store = with_store ? std::optional(small_store()) : std::nullopt;
  const Model model = model_of(with_store ? "gated_delta_rule" : rule);
  Driver driver(model, seed, journal_bytes, store);
  REQUIRE(driver.session().fused());
  for (int step = 0; step < 60; ++step) {
    INFO("step " << step);
    driver.step();
    const Session& session = driver.session();
    CHECK(session.position() == std::ssize(driver.text()));
    CHECK(session.report().checkpoint_bytes <= journal_bytes);
    const Session again =
        Session::from_log(model, session.log(), {.piece = kPiece, .store = store});
    REQUIRE(same_bits(session, again));
    REQUIRE(session.report().limited_writes == again.report().limited_writes);
  }
  for (const auto& [session, state] : driver.parted()) check_state(session, state);
}

TEST_CASE("sessions that are edited on many threads share one model", "[edits]") {
  const Model model = model_of("gated_delta_rule");
  const OneThread one_thread;
  const auto run = [&](std::uint64_t seed) {
    at::set_num_threads(1);
    Driver driver(model, seed, 200000);
    for (int step = 0; step < 40; ++step) driver.step();
    return driver.session();
  };
  std::vector<Session> alone;
  for (std::uint64_t seed = 0; seed < 4; ++seed) alone.push_back(run(seed));
  std::vector<Session> together(4, Session(model));
  std::vector<std::thread> workers;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    workers.emplace_back([&, seed] { together[seed] = run(seed); });
  }
  for (std::thread& worker : workers) worker.join();
  for (std::size_t i = 0; i < 4; ++i) CHECK(same_bits(alone[i], together[i]));
}

// ---- cancelling, forks, the journal ------------------------------------------------------------

TEST_CASE("an edit that is stopped has not happened", "[edits]") {
  Session session(random_model(), {.piece = kPiece, .journal_bytes = 0});
  session.read(noise(60));
  const auto mark = session.mark();
  session.write({.max_tokens = 30});
  const Session before = session;
  const auto unchanged = [&] {
    CHECK(same_bits(session, before));
    CHECK((session.log() == before.log()));
    CHECK(session.position(mark) == 60);
    CHECK(session.report().checkpoints == before.report().checkpoints);
  };
  std::vector<std::int64_t> seen;
  const auto third = [&](std::int64_t done, std::int64_t total) {
    CHECK(total == 89);
    seen.push_back(done);
    return seen.size() < 3;
  };
  CHECK_THROWS_AS(session.rollback(89, third), Cancelled);
  CHECK(seen == std::vector<std::int64_t>{16, 32, 48});
  unchanged();
  const auto stop = [](auto, auto) { return false; };
  CHECK_THROWS_AS(session.rollback(20, stop), Cancelled);
  unchanged();
  CHECK_THROWS_AS(session.feedback(mark, 0.5F, stop), Cancelled);
  unchanged();
  CHECK_THROWS_AS(session.revoke(0, 10, stop), Cancelled);
  unchanged();
  const auto fail = [](auto, auto) -> bool { throw std::runtime_error("mine"); };
  CHECK_THROWS_WITH(session.revoke(0, 10, fail), "mine");
  unchanged();
  CHECK_THROWS_AS(Session::from_log(random_model(), session.log(), {.piece = kPiece}, stop),
                  Cancelled);
}

TEST_CASE("a thousand forks cost what differs", "[edits]") {
  const OneThread one_thread;
  Session session(random_model(), {.piece = 1024});
  for (int i = 0; i < 20; ++i) session.read(noise(5000, 1));
  session.mark();
  const auto allocated = [] { return mallinfo2().uordblks + mallinfo2().hblkhd; };
  const auto state_bytes = [&] {
    std::size_t bytes = 0;
    for (const auto& [name, tensor] : session.state()) bytes += tensor.nbytes();
    return bytes;
  }();
  const auto before = allocated();
  std::vector<Session> forks;
  forks.reserve(1000);
  for (int i = 0; i < 1000; ++i) forks.push_back(session.fork());
  CHECK(allocated() - before < 1000 * 2500);
  CHECK(same_bits(forks[500], session));
  forks[500].write({.max_tokens = 1});
  CHECK(allocated() - before < 1000 * 2500 + 3 * state_bytes + 20000);
  forks[3].rollback(99999);
  CHECK(session.position() == 100000);
  Session expected(random_model(), {.piece = 1024});
  for (int i = 0; i < 20; ++i) expected.read(noise(5000, 1));
  CHECK(same_bits(session, expected));
}

TEST_CASE("checkpoints keep within their budget, and grow rarer with distance", "[edits]") {
  const OneThread one_thread;
  const std::int64_t one = [] {
    Session session(random_model(), {.piece = 8});
    session.read(noise(8));
    return session.report().checkpoint_bytes;
  }();
  Session session(random_model(), {.piece = 8, .journal_bytes = 20 * one + one / 2});
  session.read(noise(8000));
  CHECK(session.report().checkpoints == 20);
  CHECK(session.report().checkpoint_bytes == 20 * one);
  // Tokens that a rollback has to replay, against how far back it goes.
  const auto replayed = [&](std::int64_t back) {
    Session fork = session;
    std::int64_t total = 0;
    fork.rollback(8000 - back, [&](std::int64_t, std::int64_t all) {
      total = all;
      return true;
    });
    return total;
  };
  CHECK(replayed(3) <= 16);
  CHECK(replayed(60) <= 120);
  CHECK(replayed(500) <= 600);
  CHECK(replayed(4000) <= 3500);
  CHECK(Session(random_model(), {.journal_bytes = 0}).report().checkpoints == 0);
  Session writer(random_model());
  writer.write({.max_tokens = 200, .seed = 1});
  CHECK(writer.report().checkpoints == 3);  // one for every 64 written tokens
  CHECK_THROWS_AS(Session(random_model(), {.journal_bytes = -1}), Error);
}

TEST_CASE("there are never more than 512 checkpoints, however small they are", "[edits]") {
  const OneThread one_thread;
  Session session(random_model(), {.piece = 1});
  session.read(noise(600));
  CHECK(session.report().checkpoints == 512);
  session.rollback(301);
  Session expected(random_model(), {.piece = 1});
  expected.read(noise(301));
  CHECK(same_bits(session, expected));
}

TEST_CASE("large tensors in checkpoints are their own, too", "[edits]") {
  const OneThread one_thread;
  auto config = small_config();
  config.memory_key_size = config.memory_value_size = 128;  // 128 KiB of fast weights in a layer
  const Model model = random_model(1, config);
  Session session(model, {.piece = kPiece});
  session.read(noise(40));
  session.write({.max_tokens = 150, .seed = 3});
  const Session written = session.fork();
  session.rollback(110);
  Session straight(model, {.piece = kPiece});
  straight.read(noise(40));
  straight.write({.max_tokens = 70, .seed = 3});
  CHECK(same_bits(session, straight));
  CHECK(same_bits(written, Session::from_log(model, written.log(), {.piece = kPiece})));
}

TEST_CASE("a report counts", "[edits]") {
  Session session(random_model(), {.piece = kPiece});
  session.read(noise(100));
  session.write({.max_tokens = 40});
  session.mark();
  session.rollback(130);
  session.revoke(0, 10);
  const auto report = session.report();
  CHECK(report.read == 90);
  CHECK(report.written == 30);
  CHECK(report.committed == 0);
  CHECK(report.checkpoints > 5);
  CHECK(report.log_bytes > 120);
  CHECK(report.log_bytes < 400);
  CHECK(report.marks == 0);
}

TEST_CASE("a log makes its session anew", "[edits]") {
  const Model model = random_model();
  Session session(model, {.piece = kPiece, .seed = 9});
  session.read(noise(30));
  session.write({.max_tokens = 20});
  session.feedback(10, 40, 0.5F);
  const Session again = Session::from_log(model, session.log(), {.piece = kPiece});
  CHECK(same_bits(again, session));
  CHECK((again.log() == session.log()));
  CHECK(same_bits(Session::from_log(model, SessionLog(256)), Session(model)));
  CHECK_THROWS_WITH(Session::from_log(model, SessionLog(300)), ContainsSubstring("256 tokens"));
}

// ---- merging -----------------------------------------------------------------------------------

TEST_CASE("merged, a session is one that went on with what the other did", "[edits]") {
  const OneThread one_thread;
  const auto store = GENERATE(false, true);
  const Model model = model_of("fast_head");
  const SessionOptions options = {.piece = kPiece,
                                  .store = store ? std::optional(small_store()) : std::nullopt};
  Session base(model, options);
  base.read(noise(50, 1));
  base.write({.max_tokens = 10, .seed = 3});
  Session mine = base;
  Session theirs = base;
  mine.read(noise(37, 2));
  const auto mark = mine.mark();
  const std::string written = theirs.write({.max_tokens = 20, .seed = 9});
  theirs.read(noise(40, 4));
  theirs.feedback(65, 100, 0.5F);

  Session expected = mine;
  expected.write({.max_tokens = 0});
  const auto begin = mine.position();
  mine.merge(theirs);
  CHECK(mine.position() == begin + 60);
  CHECK(mine.position(mark) == begin);
  const auto log = mine.log();
  const auto tail = log.tokens(begin, begin + 20);
  CHECK(std::string(tail.begin(), tail.end()) == written);
  CHECK(log.strengths(begin + 5, begin + 40) == std::vector<float>(35, 0.5F));
  CHECK(log.strengths(begin, begin + 5).empty());
  CHECK(log.generator() == theirs.log().generator());
  CHECK(same_bits(mine, Session::from_log(model, log, options)));
  mine.rollback(mark);
  CHECK(same_bits(mine, expected));

  Session again = theirs;
  again.merge(theirs);
  CHECK((again.log() == theirs.log()));
  CHECK(same_bits(again, theirs));
  Session behind = base;
  behind.merge(theirs);  // it had nothing of its own
  CHECK((behind.log() == theirs.log()));
  CHECK(same_bits(behind, theirs));
}

TEST_CASE("where two logs part", "[edits]") {
  const Model model = model_of("gated_delta_rule");
  Session a(model, {.piece = kPiece});
  a.read("the same beginning");
  Session b = a;
  CHECK(a.log().common_end(b.log()) == 18);
  b.read(" and more");
  CHECK(a.log().common_end(b.log()) == 18);
  a.read(" and less");
  CHECK(a.log().common_end(b.log()) == 23);  // " and "
  CHECK(b.log().common_end(a.log()) == 23);
  a.feedback(4, 8, 0.5F);
  CHECK(a.log().common_end(b.log()) == 4);
  Session other_calls(model, {.piece = kPiece});
  other_calls.read("the same");
  other_calls.read(" beginning");
  CHECK(other_calls.log().common_end(b.log()) == 8);
}

TEST_CASE("what does not begin alike cannot be merged", "[edits]") {
  const OneThread one_thread;
  const Model model = model_of("gated_delta_rule");
  Session a(model, {.piece = kPiece});
  a.read(noise(40, 1));
  Session b = a;
  a.commit();
  CHECK_THROWS_WITH(a.merge(b), ContainsSubstring("committed"));
  b.commit();
  b.read(noise(10, 2));
  a.merge(b);
  CHECK(same_bits(a, b));
  Session other(model, {.piece = kPiece});
  other.read(noise(40, 5));
  other.commit();
  CHECK_THROWS_WITH(a.merge(other), ContainsSubstring("committed"));
  Session elsewhere(model_of("delta_rule"), {.piece = kPiece});
  CHECK_THROWS_WITH(a.merge(elsewhere), ContainsSubstring("the same model"));
  Session stopped(model, {.piece = kPiece});
  Session longer = stopped;
  longer.read(noise(64, 1));
  CHECK_THROWS_AS(stopped.merge(longer, [](auto, auto) { return false; }), Cancelled);
  CHECK(stopped.position() == 0);
}
