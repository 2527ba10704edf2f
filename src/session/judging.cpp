#include "fastweights/session/judging.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "fastweights/core/error.hpp"
#include "fastweights/io/tokenizer.hpp"

namespace fastweights {
namespace {

// ---- the loop ----------------------------------------------------------------------------------

/// Seeds of the candidates after the first: what the first one's generator would draw next.
std::uint64_t next_seed(Generator& generator) {
  return static_cast<std::uint64_t>(generator.uniform() * 0x1.0p53);
}

std::vector<Candidate> write_candidates(const Session& session, const WriteOptions& options,
                                        std::int64_t count) {
  Generator generator = options.seed ? Generator{.seed = *options.seed} : session.log().generator();
  WriteOptions own = options;
  std::vector<Candidate> candidates;
  for (std::int64_t i = 0; i < count; ++i) {
    if (i > 0) own.seed = next_seed(generator);
    Session after = session.fork();
    std::string text = after.write(own);
    candidates.push_back({std::move(text), std::move(after)});
  }
  return candidates;
}

void check(const Judgement& judgement, std::size_t candidates) {
  if (judgement.choice < 0 || judgement.choice >= static_cast<std::int64_t>(candidates)) {
    throw Error(
        fmt::format("judge: the choice must be in [0, {}), got {}", candidates, judgement.choice));
  }
  if (!(judgement.strength >= 0.0F && judgement.strength <= 2.0F)) {
    throw Error(fmt::format("judge: the strength must be in [0, 2], got {}", judgement.strength));
  }
}

JudgedPassage write_passage(Session& session, const Judge& judge, const WriteOptions& options,
                            std::int64_t count) {
  const std::int64_t begin = session.position();
  std::vector<Candidate> candidates = write_candidates(session, options, count);
  Judgement judgement = judge(session, candidates);
  check(judgement, candidates.size());
  auto& [text, next] = candidates[static_cast<std::size_t>(judgement.choice)];
  next.feedback(begin, judgement.strength);
  next.read(judgement.correction);
  session = std::move(next);
  return {begin, std::move(text), std::move(judgement)};
}

// ---- facts -------------------------------------------------------------------------------------

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/// Whether a word goes on with this byte; all of UTF-8 beyond ASCII does.
bool is_word(char c) {
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_' ||
         static_cast<unsigned char>(c) >= 0x80;
}

enum class Match : std::uint8_t { kYes, kNo, kUndecided };

/// How a text goes on from a place, and the first byte that was not looked at.
struct Matched {
  Match match;
  std::size_t end;
};

Matched match_at(std::string_view text, std::size_t at, std::string_view pattern) {
  for (std::size_t i = 0; i < pattern.size();) {
    if (at >= text.size()) return {Match::kUndecided, at};
    if (is_space(pattern[i])) {
      if (!is_space(text[at])) return {Match::kNo, at + 1};
      while (i < pattern.size() && is_space(pattern[i])) ++i;
      while (at < text.size() && is_space(text[at])) ++at;
    } else if (pattern[i++] != text[at++]) {
      return {Match::kNo, at};
    }
  }
  return {Match::kYes, at};
}

/// The same for a value, which must end where a word ends.
Matched match_value(std::string_view text, std::size_t at, std::string_view value) {
  const Matched found = match_at(text, at, value);
  if (found.match != Match::kYes || !is_word(value.back())) return found;
  if (found.end >= text.size()) return {Match::kUndecided, found.end};
  return {is_word(text[found.end]) ? Match::kNo : Match::kYes, found.end + 1};
}

/// What a passage says of the facts.
struct Statements {
  std::int64_t right = 0;
  std::int64_t wrong = 0;
  std::vector<bool> contradicted;  // of each fact
};

class FactSheet {
 public:
  FactSheet(std::vector<Fact> facts, const FactJudgeOptions& options)
      : facts_(std::move(facts)), options_(options) {
    for (Fact& fact : facts_) {
      if (fact.cue.empty() || fact.value.empty()) {
        throw Error("judge: a fact needs a cue and a value");
      }
      if (fact.statement.empty()) fact.statement = fact.cue + fact.value + ".\n";
      lookback_ = std::max(lookback_, fact.cue.size() + fact.value.size() + kSpareSpace);
    }
  }

  Judgement operator()(const Session& before, std::span<const Candidate> candidates) const {
    const std::string context = tail(before.log());
    std::optional<Statements> best;
    Judgement judgement;
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      Statements statements = statements_in(context, candidates[i].text);
      if (best &&
          std::tie(best->wrong, statements.right) <= std::tie(statements.wrong, best->right)) {
        continue;
      }
      best = std::move(statements);
      judgement.choice = static_cast<std::int64_t>(i);
    }
    if (best) decide(*best, judgement);
    return judgement;
  }

 private:
  /// White space beyond the pattern's own that a statement across a border may have.
  static constexpr std::size_t kSpareSpace = 256;

  std::string tail(const SessionLog& log) const {
    const auto most = static_cast<std::int64_t>(lookback_);
    return io::ByteTokenizer().decode(
        log.tokens(std::max(log.start(), log.end() - most), log.end()));
  }

  Statements statements_in(const std::string& context, const std::string& passage) const {
    const std::string text = context + passage;
    Statements out;
    out.contradicted.resize(facts_.size());
    for (std::size_t n = 0; n < facts_.size(); ++n) {
      for (std::size_t at = 0; at < text.size(); ++at) {
        const Matched cue = match_at(text, at, facts_[n].cue);
        if (cue.match != Match::kYes) continue;
        at = cue.end - 1;
        const Matched value = match_value(text, cue.end, facts_[n].value);
        if (value.match == Match::kUndecided || value.end <= context.size()) continue;
        out.right += value.match == Match::kYes ? 1 : 0;
        out.wrong += value.match == Match::kNo ? 1 : 0;
        out.contradicted[n] = out.contradicted[n] || value.match == Match::kNo;
      }
    }
    return out;
  }

  void decide(const Statements& statements, Judgement& judgement) const {
    if (statements.wrong > 0) {
      judgement.strength = options_.wrong;
    } else {
      judgement.strength = statements.right > 0 ? options_.right : options_.silent;
    }
    if (!options_.correct) return;
    for (std::size_t n = 0; n < facts_.size(); ++n) {
      if (statements.contradicted[n]) judgement.correction += facts_[n].statement;
    }
  }

  std::vector<Fact> facts_;
  FactJudgeOptions options_;
  std::size_t lookback_ = 0;
};

}  // namespace

std::vector<JudgedPassage> write_judged(Session& session, const Judge& judge,
                                        const JudgedWriteOptions& options,
                                        const Progress& progress) {
  if (!judge) throw Error("judge: there is none");
  if (options.candidates < 1) {
    throw Error(fmt::format("judge: candidates must be at least 1, got {}", options.candidates));
  }
  if (options.passages < 0) {
    throw Error(fmt::format("judge: passages must be at least 0, got {}", options.passages));
  }
  WriteOptions write = options.write;
  std::vector<JudgedPassage> passages;
  while (std::ssize(passages) < options.passages) {
    passages.push_back(write_passage(session, judge, write, options.candidates));
    write.seed.reset();
    const bool go_on = !progress || progress(std::ssize(passages), options.passages);
    if (!go_on && std::ssize(passages) < options.passages) {
      throw Cancelled(fmt::format("session: stopped after {} of {} passages", passages.size(),
                                  options.passages));
    }
  }
  return passages;
}

Judge fact_judge(std::vector<Fact> facts, const FactJudgeOptions& options) {
  return FactSheet(std::move(facts), options);
}

Judge likelihood_judge(std::string held_out, const LikelihoodJudgeOptions& options) {
  if (held_out.empty()) throw Error("judge: the held-out text is empty");
  return [held_out = std::move(held_out), options](const Session& before,
                                                   std::span<const Candidate> candidates) {
    std::vector<double> bits;
    for (const Candidate& candidate : candidates) bits.push_back(candidate.after.score(held_out));
    const auto best = std::ranges::min_element(bits);
    const bool within = *best <= before.score(held_out) + options.tolerance;
    return Judgement{.choice = best - bits.begin(),
                     .strength = within ? options.better : options.worse};
  };
}

Judge preference_judge(
    std::function<bool(std::string_view first, std::string_view second)> second_is_better) {
  if (!second_is_better) throw Error("judge: there is no preference");
  return [prefers_second = std::move(second_is_better)](const Session&,
                                                        std::span<const Candidate> candidates) {
    if (candidates.size() < 2) {
      throw Error("judge: a preference needs at least two candidates");
    }
    std::size_t best = 0;
    for (std::size_t i = 1; i < candidates.size(); ++i) {
      if (prefers_second(candidates[best].text, candidates[i].text)) best = i;
    }
    return Judgement{.choice = static_cast<std::int64_t>(best)};
  };
}

}  // namespace fastweights
