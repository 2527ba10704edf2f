#include "fastweights/session/mixture.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "fastweights/core/error.hpp"

namespace fastweights {
namespace {

double sum_of(const Mixture::Weights& values) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum;
}

bool is_valid(const Mixture::Bucket& bucket) {
  double sum = 0.0;
  for (const float weight : bucket.weights) {
    if (!(weight > 0.0f)) return false;
    sum += static_cast<double>(weight);
  }
  return std::abs(sum - 1.0) < 1e-3 && bucket.seen >= 0.0f && std::isfinite(bucket.seen);
}

}  // namespace

Mixture::Weights Mixture::weights(std::size_t bucket,
                                  const std::array<bool, kExperts>& present) const {
  const Bucket& from = (*buckets_)[bucket];
  Weights weights{};
  for (std::size_t i = 0; i < kExperts; ++i) {
    if (present[i]) weights[i] = static_cast<double>(from.weights[i]);
  }
  const double sum = sum_of(weights);
  for (double& weight : weights) weight /= sum;
  return weights;
}

void Mixture::learn(std::size_t bucket, const std::array<bool, kExperts>& present,
                    const std::array<double, kExperts>& probabilities) {
  const Weights before = weights(bucket, present);
  Weights posterior{};
  for (std::size_t i = 0; i < kExperts; ++i) posterior[i] = before[i] * probabilities[i];
  const double evidence = sum_of(posterior);
  if (!(evidence > 0.0)) return;  // nobody saw it coming: nothing speaks for one or the other
  Bucket& to = buckets_.edit()[bucket];
  to.seen += 1.0f;
  const double step =
      std::max(options_.rate, 1.0 / (static_cast<double>(to.seen) + options_.prior));
  // The experts that speak share what they had, so that the silent ones keep theirs.
  double share = 0.0;
  for (std::size_t i = 0; i < kExperts; ++i) {
    if (present[i]) share += static_cast<double>(to.weights[i]);
  }
  Weights after{};
  for (std::size_t i = 0; i < kExperts; ++i) {
    after[i] = present[i] ? share * ((1.0 - step) * before[i] + step * posterior[i] / evidence)
                          : static_cast<double>(to.weights[i]);
    after[i] = std::max(after[i], options_.least);
  }
  const double sum = sum_of(after);
  for (std::size_t i = 0; i < kExperts; ++i) {
    to.weights[i] = static_cast<float>(after[i] / sum);
  }
}

void Mixture::restore(std::vector<Bucket> buckets) {
  if (buckets.size() != buckets_->size()) {
    throw Error("mixture: there must be " + std::to_string(buckets_->size()) + " buckets, got " +
                std::to_string(buckets.size()));
  }
  if (!std::all_of(buckets.begin(), buckets.end(), is_valid)) {
    throw Error("mixture: a bucket's weights must be positive and sum to 1");
  }
  buckets_.edit() = std::move(buckets);
}

}  // namespace fastweights
