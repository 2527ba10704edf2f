#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "fastweights/session/shared_pages.hpp"

namespace fastweights {

/// Mixes the predictions of a few experts, p = Σ wᵢ pᵢ, with weights that it learns as a text goes
/// by, apart for each bucket (what the experts look like at a place).
///
/// Of the weights of a bucket, those of the experts that speak are scaled to sum to 1. After each
/// token they move towards the posterior, wᵢ pᵢ(token) / p(token), by 1 / (times the bucket was
/// seen + `prior`), or by `rate` where that is more: expectation maximisation over what was seen,
/// older tokens counting less. A weight never falls below `least`, so that an expert can come back.
/// A copy shares the weights until one of the two learns. No LibTorch.
class Mixture {
 public:
  static constexpr std::size_t kExperts = 3;
  /// A number for each expert.
  using Weights = std::array<double, kExperts>;

  /// How weights move; see above.
  struct Options {
    double rate = 0.02;
    double prior = 2.0;
    double least = 1e-4;
  };

  /// Weights of a bucket and how often it was seen.
  struct Bucket {
    std::array<float, kExperts> weights = {};
    float seen = 0.0f;

    bool operator==(const Bucket&) const = default;
  };

  /// Buckets with the weights that they begin with: positive, with the sum 1.
  Mixture(std::vector<Bucket> buckets, const Options& options)
      : options_(options), buckets_(std::move(buckets)) {}

  /// The weights of a bucket where only the experts that are `present` speak: these sum to 1, the
  /// others are 0.
  Weights weights(std::size_t bucket, const std::array<bool, kExperts>& present) const;

  /// Learns from a token to which the experts gave these probabilities, mixed with `weights`.
  void learn(std::size_t bucket, const std::array<bool, kExperts>& present,
             const std::array<double, kExperts>& probabilities);

  std::span<const Bucket> buckets() const { return *buckets_; }
  /// Takes up weights from their stored form. Throws Error unless there are as many buckets, each
  /// with positive weights that sum to 1 and a finite count ≥ 0.
  void restore(std::vector<Bucket> buckets);
  /// Whether `other` has the same weights in the same memory.
  bool shares(const Mixture& other) const { return &*buckets_ == &*other.buckets_; }
  std::int64_t bytes() const {
    return static_cast<std::int64_t>(buckets_->size() * sizeof(Bucket));
  }

 private:
  Options options_;
  Shared<std::vector<Bucket>> buckets_;
};

}  // namespace fastweights
