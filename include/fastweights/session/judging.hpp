/// \file
/// Writing that is judged: write, ask a judge, learn as it says (docs/judging.md).
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fastweights/session/session.hpp"

namespace fastweights {

/// A way to go on, and the session that has written it.
struct Candidate {
  std::string text;
  Session after;
};

/// What a judge says.
struct Judgement {
  std::int64_t choice = 0;  ///< the candidate that stays; the others leave no trace
  /// How strongly it is learned, as in `Session::feedback`: 0 not at all, 1 as written, up to 2.
  float strength = 1.0F;
  std::string correction = {};  ///< read after it, and learned; empty: nothing
};

/// Says which of some candidates stays, at least one, and how strongly it is learned. `before` is
/// the session that all of them go on from. What a judge throws, `write_judged` throws.
using Judge =
    std::function<Judgement(const Session& before, std::span<const Candidate> candidates)>;

/// What `write_judged` writes.
struct JudgedWriteOptions {
  /// Of each passage. The first candidate draws from the session's generator, restarted by
  /// `write.seed`, if that is given, before the first passage; each further candidate from one that
  /// is seeded with the next number of that generator. `write.on_token` sees all candidates, one
  /// after the other.
  WriteOptions write = {};
  std::int64_t passages = 1;    ///< written one after the other, each judged before the next
  std::int64_t candidates = 1;  ///< written for each passage
};

/// A passage that stayed, and what was said of it.
struct JudgedPassage {
  std::int64_t position = 0;  ///< where it begins
  std::string text;
  Judgement judgement;
};

/// Writes passages, has each judged, and learns as the judge says. Afterwards the session is, bit
/// for bit, one that for each passage wrote the chosen candidate, was given
/// feedback(passage, strength), and read the correction.
///
/// If a call throws, the session holds the passages that were judged before. Throws Error if there
/// are fewer than one candidate, fewer than none passages, or a judgement is out of range.
/// @param progress between passages, with those done and in all; false throws Cancelled
std::vector<JudgedPassage> write_judged(Session& session, const Judge& judge,
                                        const JudgedWriteOptions& options = {},
                                        const Progress& progress = {});

/// Something that a text must not contradict: wherever it says `cue`, `value` must follow.
struct Fact {
  std::string cue;        ///< "The steward's name is "
  std::string value;      ///< "Aldous"
  std::string statement;  ///< read where a text contradicts it; empty: cue, value, ".\n"
};

/// How strongly fact_judge() has a passage learned, and what it does about contradictions.
struct FactJudgeOptions {
  float right = 1.0F;   ///< strength of a passage that states facts rightly
  float wrong = 0.0F;   ///< of one that contradicts any
  float silent = 1.0F;  ///< of one that states none
  bool correct = true;  ///< whether the statement of each contradicted fact is read
};

/// A judge that holds a text against a fact sheet. It keeps the candidate with the fewest
/// contradictions, of equals the one with the most right statements, of these the first. Any run of
/// white space is as good as another; a value ends where a word ends. A statement that began in an
/// earlier passage counts in the passage that decides it. Throws Error if a cue or value is empty.
Judge fact_judge(std::vector<Fact> facts, const FactJudgeOptions& options = {});

/// What likelihood_judge() forgives, and how strongly it has a passage learned.
struct LikelihoodJudgeOptions {
  double tolerance = 0.0;  ///< bits per byte that the held-out text may cost more
  float better = 1.0F;     ///< strength of a passage within the tolerance
  float worse = 0.0F;      ///< of one beyond it
};

/// A judge that asks what learning a passage does to a held-out text: it keeps the candidate after
/// which the text costs the fewest bits. Each judgement reads the text once per candidate, and once
/// from the place before. Throws Error if the text is empty.
Judge likelihood_judge(std::string held_out, const LikelihoodJudgeOptions& options = {});

/// A judge that asks for preferences between pairs: the first against the second candidate, the
/// winner against the third, and so on. Where there is only one candidate the judge throws Error.
Judge preference_judge(
    std::function<bool(std::string_view first, std::string_view second)> second_is_better);

}  // namespace fastweights
