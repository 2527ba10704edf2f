#include "fastweights/session/judging.hpp"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastweights/core/error.hpp"
#include "small_session.hpp"

namespace fastweights::test {
namespace {

using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;

Judge says(const Judgement& judgement) {
  return [judgement](const Session&, std::span<const Candidate>) { return judgement; };
}

Session started(bool store = false) {
  SessionOptions options{.piece = 8, .seed = 3};
  if (store) options.store = ExactStoreOptions();
  Session session(random_model(), options);
  session.read("It was a dark and stormy night. ");
  return session;
}

/// What a judge says of one candidate that goes on from `before` with `text`.
Judgement said(const Judge& judge, const std::string& before, const std::string& text) {
  Session session(random_model(), {.piece = 8});
  session.read(before);
  Session after = session.fork();
  after.read(text);
  return judge(session, std::vector<Candidate>{{text, after}});
}

// ---- the loop ----------------------------------------------------------------------------------

TEST_CASE("judging: the session is one that wrote, was given feedback, and read the correction") {
  for (const bool store : {false, true}) {
    for (const float strength : {0.0F, 0.5F, 1.0F, 1.7F}) {
      for (const std::string correction : {"", "No: the night was bright. "}) {
        INFO("strength " << strength << ", correction '" << correction << "', store " << store);
        Session judged = started(store);
        Session driven = judged.fork();
        const JudgedWriteOptions options{.write = {.max_tokens = 21, .seed = 9}, .passages = 3};
        const auto passages =
            write_judged(judged, says({.strength = strength, .correction = correction}), options);

        REQUIRE(passages.size() == 3);
        WriteOptions write = options.write;
        for (const JudgedPassage& passage : passages) {
          CHECK(passage.position == driven.position());
          CHECK(passage.judgement.strength == strength);
          CHECK(passage.judgement.correction == correction);
          const Mark mark = driven.mark();
          CHECK(driven.write(write) == passage.text);
          driven.feedback(mark, strength);
          driven.read(correction);
          write.seed.reset();
        }
        CHECK(same_bits(judged, driven));
        CHECK(judged.log() == driven.log());
      }
    }
  }
}

TEST_CASE("judging: the candidate that is chosen stays, the others leave no trace") {
  const Session before = started();
  std::vector<std::string> texts;
  for (std::int64_t choice = 0; choice < 3; ++choice) {
    Session session = before;
    std::vector<Candidate> seen;
    const Judge judge = [&](const Session& from, std::span<const Candidate> candidates) {
      CHECK(same_bits(from, before));
      seen.assign(candidates.begin(), candidates.end());
      return Judgement{.choice = choice};
    };
    const auto passages =
        write_judged(session, judge, {.write = {.max_tokens = 20}, .candidates = 3});
    REQUIRE(seen.size() == 3);
    const Candidate& chosen = seen[static_cast<std::size_t>(choice)];
    CHECK(passages.front().text == chosen.text);
    CHECK(same_bits(session, chosen.after));
    CHECK(session.log() == chosen.after.log());
    texts.push_back(chosen.text);
  }
  CHECK(texts[0] != texts[1]);
  CHECK(texts[1] != texts[2]);
  CHECK(texts[0] != texts[2]);
  Session plain = before;
  CHECK(plain.write({.max_tokens = 20}) == texts[0]);
}

TEST_CASE("judging: candidates are the same in every run, and others in the next passage") {
  const JudgedWriteOptions options{
      .write = {.max_tokens = 16, .seed = 5}, .passages = 2, .candidates = 2};
  const auto run = [&] {
    Session session = started();
    return write_judged(session, says({.choice = 1}), options);
  };
  const auto first = run();
  const auto second = run();
  REQUIRE(first.size() == 2);
  CHECK(first[0].text == second[0].text);
  CHECK(first[1].text == second[1].text);
  CHECK(first[0].text != first[1].text);
}

TEST_CASE("judging: what a judge throws arrives, and the passages before it stay") {
  Session session = started();
  Session driven = session.fork();
  int asked = 0;
  const Judge judge = [&](const Session&, std::span<const Candidate>) -> Judgement {
    if (++asked == 3) throw std::runtime_error("I cannot say");
    return {.strength = 0.5F};
  };
  CHECK_THROWS_WITH(write_judged(session, judge, {.write = {.max_tokens = 10}, .passages = 5}),
                    ContainsSubstring("I cannot say"));
  write_judged(driven, says({.strength = 0.5F}), {.write = {.max_tokens = 10}, .passages = 2});
  CHECK(same_bits(session, driven));
}

TEST_CASE("judging: progress may stop it between passages") {
  Session session = started();
  const std::int64_t begin = session.position();
  std::vector<std::int64_t> seen;
  const Progress stop = [&](std::int64_t done, std::int64_t total) {
    CHECK(total == 4);
    seen.push_back(done);
    return done < 2;
  };
  const JudgedWriteOptions options{.write = {.max_tokens = 10}, .passages = 4};
  CHECK_THROWS_AS(write_judged(session, says({}), options, stop), Cancelled);
  CHECK(seen == std::vector<std::int64_t>{1, 2});
  CHECK(session.position() == begin + 20);
}

TEST_CASE("judging: options and judgements out of range are errors that change nothing") {
  Session session = started();
  const Session before = session;
  const auto message = [](const std::string& text) {
    return MessageMatches(ContainsSubstring(text));
  };
  CHECK_THROWS_MATCHES(write_judged(session, Judge()), Error, message("there is none"));
  CHECK_THROWS_MATCHES(write_judged(session, says({}), {.candidates = 0}), Error,
                       message("candidates must be at least 1, got 0"));
  CHECK_THROWS_MATCHES(write_judged(session, says({}), {.passages = -1}), Error,
                       message("passages must be at least 0, got -1"));
  const JudgedWriteOptions two{.write = {.max_tokens = 4}, .candidates = 2};
  CHECK_THROWS_MATCHES(write_judged(session, says({.choice = 2}), two), Error,
                       message("choice must be in [0, 2), got 2"));
  CHECK_THROWS_MATCHES(write_judged(session, says({.choice = -1}), two), Error,
                       message("choice must be in [0, 2), got -1"));
  CHECK_THROWS_MATCHES(write_judged(session, says({.strength = 2.5F}), two), Error,
                       message("strength must be in [0, 2], got 2.5"));
  CHECK_THROWS_MATCHES(write_judged(session, says({.strength = std::nanf("")}), two), Error,
                       message("strength must be in [0, 2]"));
  CHECK_THROWS_AS(fact_judge({{.cue = "", .value = "x", .statement = ""}}), Error);
  CHECK_THROWS_AS(fact_judge({{.cue = "x", .value = "", .statement = ""}}), Error);
  CHECK_THROWS_AS(likelihood_judge(""), Error);
  CHECK_THROWS_AS(preference_judge({}), Error);
  CHECK(same_bits(session, before));
  CHECK(write_judged(session, says({}), {.passages = 0}).empty());
}

// ---- facts -------------------------------------------------------------------------------------

const std::vector<Fact> kSteward = {
    {.cue = "The steward's name is ", .value = "Aldous", .statement = ""}};
const FactJudgeOptions kFigures{.right = 1.5F, .wrong = 0.25F, .silent = 1.0F, .correct = true};

TEST_CASE("judging: a fact sheet tells right from wrong and from silence") {
  const Judge judge = fact_judge(kSteward, kFigures);
  const auto strength = [&](const std::string& text) { return said(judge, "x", text).strength; };
  CHECK(strength("The steward's name is Aldous.") == 1.5F);
  CHECK(strength("The steward's name is Aldous's.") == 1.5F);
  CHECK(strength("The steward's\n  name is\tAldous, they say.") == 1.5F);
  CHECK(strength("The steward's name is Bertram.") == 0.25F);
  CHECK(strength("The steward's name is Aldousson.") == 0.25F);
  CHECK(strength("The steward's name is Al.") == 0.25F);
  CHECK(strength("The steward's name is aldous.") == 0.25F);
  CHECK(strength("The steward's name isAldous.") == 1.0F);
  CHECK(strength("The cook's name is Bertram.") == 1.0F);
  CHECK(strength("The steward's name is Aldous. The steward's name is Bertram.") == 0.25F);
  CHECK(strength("") == 1.0F);
  // Not said to its end.
  CHECK(strength("The steward's name is Al") == 1.0F);
  CHECK(strength("The steward's name is Aldous") == 1.0F);
}

TEST_CASE("judging: what contradicts a fact sheet is corrected by its statements") {
  std::vector<Fact> facts = kSteward;
  facts.push_back({.cue = "the colour is ", .value = "blue", .statement = "It is blue. "});
  const Judge judge = fact_judge(facts, kFigures);
  CHECK(said(judge, "x", "The steward's name is Bertram.").correction ==
        "The steward's name is Aldous.\n");
  CHECK(said(judge, "x", "the colour is red, the colour is green.").correction == "It is blue. ");
  CHECK(said(judge, "x", "the colour is red. The steward's name is Bo.").correction ==
        "The steward's name is Aldous.\nIt is blue. ");
  CHECK(said(judge, "x", "the colour is blue.").correction.empty());
  const Judge silent = fact_judge(facts, {.correct = false});
  CHECK(said(silent, "x", "the colour is red.").correction.empty());
}

TEST_CASE("judging: a statement across a border counts where it is decided") {
  const Judge judge = fact_judge(kSteward, kFigures);
  const std::string text = "So. The steward's name is Aldous. ";
  const std::string wrong = "So. The steward's name is Bertram. ";
  for (std::size_t cut = 1; cut < text.size(); ++cut) {
    INFO("cut at " << cut);
    // Right is decided by the byte after the name, wrong by the first byte of another.
    CHECK(said(judge, text.substr(0, cut), text.substr(cut)).strength ==
          (cut <= text.find('.', 5) ? 1.5F : 1.0F));
    CHECK(said(judge, wrong.substr(0, cut), wrong.substr(cut)).strength ==
          (cut <= wrong.find('B') ? 0.25F : 1.0F));
  }
}

TEST_CASE("judging: of candidates a fact sheet keeps the one that contradicts it least") {
  const Judge judge = fact_judge(kSteward, kFigures);
  const Session session = started();
  const auto choice = [&](const std::vector<std::string>& texts) {
    std::vector<Candidate> candidates;
    for (const auto& text : texts) candidates.push_back({text, session});
    return judge(session, candidates).choice;
  };
  const std::string right = "The steward's name is Aldous. ";
  const std::string wrong = "The steward's name is Bertram. ";
  CHECK(choice({wrong, "Hm.", right}) == 2);
  CHECK(choice({wrong, "Hm.", "So."}) == 1);
  CHECK(choice({right + right + wrong, "Hm."}) == 1);
  CHECK(choice({wrong + wrong, wrong}) == 1);
  CHECK(choice({right, right + right, right}) == 1);
}

// ---- the others --------------------------------------------------------------------------------

TEST_CASE("judging: the likelihood of a held-out text chooses, and says how strongly") {
  auto config = small_config();
  config.fast_head = true;
  Session session(random_model(1, config), {.piece = 8});
  session.read("one two ");
  std::vector<Candidate> candidates;
  for (const std::string text : {"xyzxyzxyzxyz", "stone stone stone ", "qqqqqq"}) {
    candidates.push_back({text, session});
    candidates.back().after.read(text);
  }
  const std::string held_out = "stone stone ";
  const double before = session.score(held_out);
  const double best = candidates[1].after.score(held_out);
  REQUIRE(best < before);
  REQUIRE(best < candidates[0].after.score(held_out));
  const Judge judge = likelihood_judge(held_out, {.better = 1.25F, .worse = 0.5F});
  CHECK(judge(session, candidates).choice == 1);
  CHECK(judge(session, candidates).strength == 1.25F);

  const std::vector<Candidate> bad = {candidates[0]};
  const double cost = candidates[0].after.score(held_out) - before;
  REQUIRE(cost > 0);
  CHECK(judge(session, bad).strength == 0.5F);
  CHECK(likelihood_judge(held_out, {.tolerance = cost + 0.01})(session, bad).strength == 1.0F);
  CHECK(likelihood_judge(held_out, {.tolerance = cost - 0.01})(session, bad).strength == 0.0F);
}

TEST_CASE("judging: preferences run through all candidates") {
  const Session session = started();
  std::vector<Candidate> candidates;
  for (const std::string text : {"bb", "a", "cccc", "ccc"}) candidates.push_back({text, session});
  const Judge longest =
      preference_judge([](std::string_view a, std::string_view b) { return b.size() > a.size(); });
  CHECK(longest(session, candidates).choice == 2);
  const Judge last = preference_judge([](auto, auto) { return true; });
  CHECK(last(session, candidates).choice == 3);
  candidates.erase(candidates.begin() + 1, candidates.end());
  CHECK_THROWS_MATCHES(last(session, candidates), Error,
                       MessageMatches(ContainsSubstring("at least two candidates")));
}

}  // namespace
}  // namespace fastweights::test
