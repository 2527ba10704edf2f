#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "fastweights/core/executor.hpp"
#include "fastweights/session/shared_pages.hpp"
#include "fastweights/session/token_pages.hpp"

namespace fastweights {

/// How NearestNeighbours compares and what it keeps.
struct NearestNeighboursOptions {
  /// Entries that a search returns, in [1, 1024].
  std::int64_t count = 128;
  /// Seed of the projection of hidden states to keys.
  std::uint64_t seed = 0;
  /// Most bytes of keys and tokens: 65 per entry with a vocabulary of bytes. The oldest entries go
  /// first, 256 at a time; the last 256 always stay.
  std::int64_t bytes = std::int64_t{4} << 20;
};

/// An entry that a search found.
struct Neighbour {
  std::int64_t entry = 0;    ///< its number, counted from the first that was ever appended
  std::int32_t product = 0;  ///< of the two keys; their cosine times NearestNeighbours::kScale

  bool operator==(const Neighbour&) const = default;
};

/// Keys of hidden states: their numbers, and whether each is one (a state of zeros has no
/// direction).
struct NeighbourKeys {
  std::vector<std::int8_t> numbers;  ///< [T, 64]
  std::vector<std::uint8_t> usable;  ///< [T]

  std::span<const std::int8_t> key(std::int64_t index) const {
    return std::span(numbers).subspan(static_cast<std::size_t>(index * 64), 64);
  }
};

/// Entries (hidden state, token), and those of them whose hidden states have the greatest cosine
/// with a given one: exactly, by looking at all of them.
///
/// A hidden state is kept as 64 bytes: its projection by a fixed matrix of random signs, scaled to
/// unit norm and rounded. Products of keys are integers, and of equal ones the more recent entry
/// counts as nearer, so a result is the same for any number of threads, batch or instruction set.
/// A copy shares all entries. No LibTorch.
class NearestNeighbours {
 public:
  /// Throws Error if a size or an option is out of range.
  NearestNeighbours(std::int64_t hidden_size, std::int64_t vocabulary_size,
                    const NearestNeighboursOptions& options);

  /// The keys of hidden states [T, hidden_size].
  NeighbourKeys make_keys(std::span<const float> hidden, const core::Executor& executor) const;

  /// Appends an entry. Old entries stay until `drop_old`, so that a batch can be searched as it was
  /// at each of its tokens.
  void append(std::span<const std::int8_t> key, std::int64_t token);
  void drop_old();

  /// For each of the keys [T, 64]: its neighbours among the entries that there were when `ends[t]`
  /// had been appended, nearest first. `ends` must not fall.
  std::vector<std::vector<Neighbour>> find(std::span<const std::int8_t> keys,
                                           std::span<const std::int64_t> ends,
                                           const core::Executor& executor) const;

  const NearestNeighboursOptions& options() const { return options_; }
  std::int64_t hidden_size() const { return hidden_size_; }
  /// Entries that were ever appended.
  std::int64_t size() const { return tokens_.size(); }
  /// The oldest entry that is still there.
  std::int64_t begin() const { return tokens_.begin(); }
  /// The token of an entry in [begin(), size()).
  std::int64_t token(std::int64_t entry) const { return tokens_[entry]; }
  /// The key of an entry, 64 numbers.
  std::vector<std::int8_t> key(std::int64_t entry) const;
  std::int64_t bytes() const { return keys_.bytes() + tokens_.bytes(); }

  /// Goes back to the first `size` entries. Throws Error if that is more than there are, or if
  /// entries that there were then have been dropped since.
  void truncate(std::int64_t size);

  /// Bytes of keys and tokens that `other` does not share.
  std::int64_t bytes_apart(const NearestNeighbours& other) const {
    return keys_.bytes_apart(other.keys_) + tokens_.bytes_apart(other.tokens_);
  }

  /// Takes back the entries that this store has dropped and `earlier`, which it went on from, still
  /// has. False, and nothing is changed, if entries between the two are lost.
  bool extend_back(const NearestNeighbours& earlier);

  /// Makes an empty store one whose first entries were dropped: it begins at entry `begin`, a
  /// multiple of kPage. Throws Error if it is none, or if there are entries.
  void start_at(std::int64_t begin);

  /// The product of two equal keys, but for rounding: 320².
  static constexpr double kScale = 320.0 * 320.0;
  /// Entries of a page, the unit in which they are dropped.
  static constexpr std::int64_t kPage = 256;

 private:
  std::int64_t begin_at(std::int64_t size) const;

  std::int64_t hidden_size_;
  NearestNeighboursOptions options_;
  std::int64_t pages_;                     // most pages
  Shared<std::vector<float>> projection_;  // [hidden_size, 64]
  SharedPages<std::int8_t> keys_;
  TokenPages tokens_;
};

}  // namespace fastweights
