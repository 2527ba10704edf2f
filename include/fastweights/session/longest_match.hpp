#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "fastweights/session/shared_pages.hpp"
#include "fastweights/session/token_pages.hpp"

namespace fastweights {

/// How LongestMatch looks for a text's earlier occurrences.
struct LongestMatchOptions {
  /// Tokens that must agree before a place counts as a match; at least 1.
  std::int64_t shortest = 6;
  /// Agreement is measured up to so many tokens, at most 255.
  std::int64_t longest = 64;
  /// Places that are looked at, the most recent first, at most 64.
  std::int64_t candidates = 16;
  /// Most bytes of text and index. The oldest text goes first, a page of 1024 tokens at a time.
  std::int64_t bytes = std::int64_t{32} << 20;
};

/// A place in the text whose context ends like the present one.
struct TextMatch {
  std::int64_t position = 0;  ///< of the token that followed there
  std::int64_t length = 0;    ///< tokens before it that agree, up to `longest`

  bool operator==(const TextMatch&) const = default;
};

/// Finds where the last tokens of a text stood before in it: exactly, at any distance, without
/// training.
///
/// The candidates at a place are the most recent positions whose `shortest` preceding tokens are
/// those before the present place, and the token after the longest match of the place before: so a
/// passage, once found, is followed to its end however often its words have occurred since. Each is
/// verified on the text.
///
/// The text is kept at 1 to 4 bytes per token, and an index of about 5 bytes per token: runs of
/// 2^n pages, each a hash table of positions, that are merged as the binary counter counts, so that
/// an insertion costs O(log) and a copy shares all of them. What is found does not depend on how
/// the index lies. No LibTorch.
class LongestMatch {
 public:
  /// Throws Error if an option is out of range, or unless 1 ≤ vocabulary_size ≤ 2^31.
  LongestMatch(std::int64_t vocabulary_size, const LongestMatchOptions& options);

  /// Appends a token; one that is not `kept` is context for others and is never found itself.
  void append(std::int64_t token, bool kept = true);

  /// Matches of the present place: distinct positions, the most recent first, but the continued one
  /// before all others. At most `candidates` + 1.
  std::span<const TextMatch> matches() const {
    return {matches_.data(), static_cast<std::size_t>(match_count_)};
  }

  const LongestMatchOptions& options() const { return options_; }
  std::int64_t vocabulary_size() const { return vocabulary_size_; }
  /// Tokens appended.
  std::int64_t size() const { return text_.size(); }
  /// The oldest token that is still there.
  std::int64_t begin() const { return text_.begin(); }
  /// The token at `position` in [begin(), size()).
  std::int64_t token(std::int64_t position) const { return text_[position]; }
  /// Whether the token at `position` was kept.
  bool kept(std::int64_t position) const;
  /// Spans [begin, end) of tokens that were not kept, in order.
  std::span<const std::pair<std::int64_t, std::int64_t>> skipped() const { return *skipped_; }
  /// Bytes of text and index.
  std::int64_t bytes() const;

  /// Bytes of text and index that `other` does not share.
  std::int64_t bytes_apart(const LongestMatch& other) const;

  /// Goes back to the first `size` tokens, of which those from `begin` on were there and `matches`
  /// were found then. Throws Error if `size` is not in [0, size()], if text that there was then has
  /// been dropped since, or if a match is none of that text.
  void truncate(std::int64_t size, std::int64_t begin, std::span<const TextMatch> matches);

  /// Takes back the text that this finder has dropped and `earlier`, which it went on from, still
  /// has. False, and nothing is changed, if text between the two is lost.
  bool extend_back(const LongestMatch& earlier);

  /// Takes up a text from its stored form: an empty finder becomes one that has read `tokens`, of
  /// which the first stood at `begin`, a multiple of kPage. Throws Error if the parts do not agree.
  void restore(std::int64_t begin, std::span<const std::int64_t> tokens,
               std::vector<std::pair<std::int64_t, std::int64_t>> skipped,
               std::span<const TextMatch> matches);

  /// Tokens of a page, the unit in which text is dropped and indexed.
  static constexpr std::int64_t kPage = 1024;

 private:
  static constexpr std::int64_t kMostCandidates = 64;

  /// An index of the positions [begin, end): those in a bucket lie at starts[b] … starts[b + 1],
  /// the most recent first.
  struct Run {
    std::int64_t begin = 0;
    std::int64_t end = 0;
    int bits = 0;
    std::vector<std::uint32_t> starts;
    std::vector<std::uint32_t> positions;  // relative to begin

    std::int64_t bytes() const {
      return static_cast<std::int64_t>((starts.size() + positions.size()) * sizeof(std::uint32_t));
    }
  };

  void push_token(std::int64_t token, bool kept);
  void skip(std::int64_t position);
  std::uint32_t hash_at(std::int64_t position) const;
  std::int64_t agreement(std::int64_t position) const;
  void find();
  bool offer(std::int64_t position);
  void find_in_tail(std::uint32_t hash);
  void find_in_run(const Run& run, std::uint32_t hash);
  void index_pages();
  std::shared_ptr<const Run> make_run(std::int64_t begin, std::int64_t end) const;
  void ensure_index();
  void drop_old_text();
  void drop_text_before(std::int64_t page);
  void set_matches(std::span<const TextMatch> matches);

  std::int64_t vocabulary_size_;
  LongestMatchOptions options_;
  TokenPages text_;
  Shared<std::vector<std::pair<std::int64_t, std::int64_t>>> skipped_;
  Shared<std::vector<std::shared_ptr<const Run>>> runs_;  // oldest first, without gaps
  SharedPages<std::uint32_t> tail_;                       // hashes of [indexed_, size())
  std::int64_t indexed_ = 0;
  bool index_fits_ = true;  // else the index is that of another state of the text
  std::int64_t match_count_ = 0;
  std::array<TextMatch, kMostCandidates + 1> matches_;
};

}  // namespace fastweights
