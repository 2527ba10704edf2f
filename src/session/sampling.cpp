#include "fastweights/session/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "fastweights/core/error.hpp"

namespace fastweights {
namespace {

/// The largest logit; the check that a distribution exists at all.
std::size_t most_probable(std::span<const float> logits) {
  std::size_t best = logits.size();
  float highest = -std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == std::numeric_limits<float>::infinity()) {
      throw Error("sampling: logit " + std::to_string(i) + " of " + std::to_string(logits.size()) +
                  " must be a number or -inf, got " + std::to_string(logits[i]));
    }
    if (logits[i] > highest) {
      highest = logits[i];
      best = i;
    }
  }
  if (best == logits.size()) throw Error("sampling: no token has a probability above zero");
  return best;
}

/// Token ids that may be drawn: all in their own order, or the `top_k` first by probability. With
/// nucleus sampling they are sorted too, since it cuts the sorted list further.
std::vector<std::size_t> candidates(std::span<const float> logits, const SamplingOptions& options) {
  std::vector<std::size_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), std::size_t{0});
  const bool cut = options.top_k > 0 && static_cast<std::size_t>(options.top_k) < ids.size();
  if (!cut && options.top_p >= 1.0) return ids;
  const std::size_t kept = cut ? static_cast<std::size_t>(options.top_k) : ids.size();
  std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(kept), ids.end(),
                    [&](std::size_t a, std::size_t b) {
                      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
                    });
  ids.resize(kept);
  return ids;
}

/// How many of the sorted `weights` hold `top_p` of their sum; at least one.
std::size_t nucleus_size(const std::vector<double>& weights, double top_p) {
  const double wanted = top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
  double mass = 0.0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    mass += weights[i];
    if (mass >= wanted) return i + 1;
  }
  return weights.size();
}

/// The index at which the running sum of `weights` passes the fraction `uniform` of their sum.
std::size_t draw(const std::vector<double>& weights, double uniform) {
  const double wanted = uniform * std::accumulate(weights.begin(), weights.end(), 0.0);
  double mass = 0.0;
  std::size_t last = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] <= 0.0) continue;
    mass += weights[i];
    last = i;
    if (mass > wanted) break;
  }
  return last;
}

}  // namespace

void check_sampling_options(const SamplingOptions& options) {
  if (!(options.temperature >= 0.0) || std::isinf(options.temperature)) {
    throw Error("sampling: temperature must be a finite number of at least 0, got " +
                std::to_string(options.temperature));
  }
  if (options.top_k < 0) {
    throw Error("sampling: top_k must be at least 0, got " + std::to_string(options.top_k));
  }
  if (!(options.top_p > 0.0 && options.top_p <= 1.0)) {
    throw Error("sampling: top_p must be in (0, 1], got " + std::to_string(options.top_p));
  }
}

std::int64_t sample_token(std::span<const float> logits, const SamplingOptions& options,
                          double uniform) {
  check_sampling_options(options);
  const std::size_t best = most_probable(logits);
  if (options.temperature == 0.0) return static_cast<std::int64_t>(best);
  const std::vector<std::size_t> ids = candidates(logits, options);
  std::vector<double> weights(ids.size());
  std::transform(ids.begin(), ids.end(), weights.begin(), [&](std::size_t id) {
    return std::exp((static_cast<double>(logits[id]) - static_cast<double>(logits[best])) /
                    options.temperature);
  });
  if (options.top_p < 1.0) weights.resize(nucleus_size(weights, options.top_p));
  return static_cast<std::int64_t>(ids[draw(weights, uniform)]);
}

}  // namespace fastweights
