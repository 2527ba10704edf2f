#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fastweights/core/executor.hpp"
#include "fastweights/io/safetensors.hpp"
#include "fastweights/session/longest_match.hpp"
#include "fastweights/session/mixture.hpp"
#include "fastweights/session/nearest_neighbours.hpp"

namespace fastweights {

/// What an ExactStore keeps and how it speaks.
struct ExactStoreOptions {
  /// `match.bytes` = 0: no longest match.
  LongestMatchOptions match = {};
  /// `neighbours.bytes` = 0: no nearest neighbours.
  NearestNeighboursOptions neighbours = {};
  /// A neighbour that came `age` entries ago counts exp(cosine / temperature) · age^−recency: what
  /// was said lately is more likely to be said again. 0: all ages are alike.
  double temperature = 0.033;
  double recency = 0.5;
  /// Least step by which the weights of the mixture move, in (0, 1].
  double rate = 0.02;
};

/// A token and the probability that an expert gives to it.
struct Vote {
  std::int64_t token = 0;
  double probability = 0.0;

  bool operator==(const Vote&) const = default;
};

/// What a store recalls at a place: the votes of its experts, each with the sum 1 or empty.
struct Recall {
  std::vector<Vote> match;
  std::vector<Vote> neighbours;
  /// Tokens of the longest match, 0 where there is none.
  std::int64_t match_length = 0;
  /// Cosine of the nearest neighbour, 0 where there is none.
  double similarity = 0.0;
  /// The place's own key, empty where the hidden state has no direction.
  std::vector<std::int8_t> key;
};

/// A tensor of a store's stored form, with its own bytes.
struct StoredTensor {
  std::string name;
  io::ScalarType type = io::ScalarType::U8;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;

  io::TensorData view() const { return {name, type, shape, bytes}; }
};

/// Remembers a text token by token, exactly, and predicts from it: the store behind the window that
/// recalls verbatim at any distance, and needs no training.
///
/// An entry is a token, with the model's final hidden state that predicted it as the key and the
/// tokens before it as the context. For the next token three experts speak: the model, the nearest
/// neighbours of the hidden state, and the longest match of the text's end. A Mixture joins them,
/// with the mean of the weights of two buckets: what the match is like (its length, what the model
/// thinks of it, how certain the neighbours are), and what the neighbours are like (how certain,
/// how near, what the model thinks of them, roughly how long the match is).
///
/// A store is a function of what was appended, the same bits token by token or in batches, for any
/// number of threads. It is a value: a copy costs some kilobytes, shares what neither has changed,
/// and is independent. Budgets are in bytes, apart for text and hidden states; in each the oldest
/// goes first. No LibTorch.
class ExactStore {
 public:
  /// Throws Error if a size or an option is out of range.
  ExactStore(std::int64_t hidden_size, std::int64_t vocabulary_size,
             const ExactStoreOptions& options = {});

  /// What the store recalls where the model's final hidden state is `hidden` [hidden_size].
  Recall recall(std::span<const float> hidden, const core::Executor& executor) const;

  /// log p of every token, out [vocabulary], where the model has `logits` [vocabulary].
  void mix(const Recall& recall, std::span<const float> logits, std::span<float> out) const;

  /// Appends the token that came at this place, and learns how good the experts' votes were. With a
  /// strength of 0 the token passes: it is context for what follows, and is neither found nor
  /// learned from.
  void append(std::int64_t token, const Recall& recall, std::span<const float> logits,
              float strength = 1.0f);

  /// Tokens to read, and the model's part: at each the hidden state [hidden_size] and the logits
  /// [vocabulary] that predicted it. `strengths` may be empty: 1.
  struct Batch {
    std::span<const std::int64_t> tokens;
    std::span<const float> hidden;
    std::span<const float> logits;
    std::span<const float> strengths = {};
  };

  /// The same for many tokens at once: log p of every token at each place, out [T, vocabulary] or
  /// empty, each before the place's own token was appended. Throws Error if sizes do not agree or a
  /// token or strength is out of range; then nothing was appended.
  void read(const Batch& batch, std::span<float> out, const core::Executor& executor);

  const ExactStoreOptions& options() const { return options_; }
  std::int64_t hidden_size() const { return neighbours_.hidden_size(); }
  std::int64_t vocabulary_size() const { return vocabulary_size_; }
  /// Tokens appended.
  std::int64_t size() const { return size_; }
  const LongestMatch& match() const { return match_; }
  const NearestNeighbours& neighbours() const { return neighbours_; }
  const Mixture& mixture() const { return mixture_; }
  /// Bytes of all parts, those shared with copies included.
  std::int64_t bytes() const { return match_.bytes() + neighbours_.bytes() + mixture_.bytes(); }

  /// A place to go back to; it takes some kilobytes and keeps nothing from being dropped.
  struct Checkpoint {
    std::int64_t size = 0;
    std::int64_t text = 0;
    std::int64_t text_begin = 0;
    std::vector<TextMatch> matches;
    std::int64_t entries = 0;
    Mixture mixture;
  };
  Checkpoint checkpoint() const;

  /// Goes back: the store is, bit for bit, what it was at the checkpoint, which is one of its own
  /// or of a store that it is a copy of. Throws Error, and changes nothing, if what there was then
  /// has been dropped since for the budgets' sake (a copy of the store keeps it), or if there never
  /// was such a place.
  void rollback(const Checkpoint& checkpoint);

  /// Bytes of all parts that `other` does not share.
  std::int64_t bytes_apart(const ExactStore& other) const {
    return match_.bytes_apart(other.match_) + neighbours_.bytes_apart(other.neighbours_) +
           (mixture_.shares(other.mixture_) ? 0 : mixture_.bytes());
  }

  /// Takes back what this store has dropped and `earlier`, a copy that it went on from, still has,
  /// beyond the budgets: for `rollback` to the earlier place, or to this one. False, and nothing is
  /// changed, if there is a gap between what the two hold.
  bool extend_back(const ExactStore& earlier);

  /// All of the store: `store.options`, `store.temperature`, `store.sizes`, `store.text`,
  /// `store.skipped`, `store.matches`, `store.keys`, `store.values`, `store.mixture`.
  std::vector<StoredTensor> tensors() const;

  /// A store that goes on exactly like the one whose tensors these are; others are ignored. Throws
  /// StateMismatch if they are of other sizes, FileError if they are none of a store's.
  static ExactStore from_tensors(std::int64_t hidden_size, std::int64_t vocabulary_size,
                                 std::span<const io::TensorData> tensors);

  /// A checkpoint of a store, stored: `store.place`, `store.matches`, `store.mixture`.
  static std::vector<StoredTensor> tensors(const Checkpoint& checkpoint);

  /// The checkpoint whose tensors these are; others are ignored. Throws FileError if they are none
  /// of a checkpoint of this store.
  Checkpoint checkpoint_from_tensors(std::span<const io::TensorData> tensors) const;

 private:
  using Buckets = std::array<std::size_t, 2>;

  void add_matches(Recall& recall) const;
  void add_neighbours(Recall& recall, std::span<const Neighbour> found, std::int64_t end) const;
  Buckets buckets(const Recall& recall, std::span<const float> logits, float log_sum) const;
  void mix(const Recall& recall, std::span<const float> logits, float log_sum,
           std::span<float> out) const;
  void learn(std::int64_t token, const Recall& recall, std::span<const float> logits,
             float log_sum);
  void check_batch(const Batch& batch, std::span<const float> out) const;
  void check_sizes(const Checkpoint& checkpoint) const;
  void check_token(std::int64_t token, float strength) const;
  void read_part(const Batch& batch, std::span<float> out, const core::Executor& executor);

  ExactStoreOptions options_;
  std::int64_t vocabulary_size_;
  std::int64_t size_ = 0;
  LongestMatch match_;
  NearestNeighbours neighbours_;
  Mixture mixture_;
};

}  // namespace fastweights
