#pragma once

#include <cstdint>
#include <span>

namespace fastweights {

/// How a token is drawn from logits.
struct SamplingOptions {
  /// Logits are divided by it; 0 takes the most probable token (the first of equals).
  double temperature = 1.0;
  /// Only the `top_k` most probable tokens can be drawn; 0 means all.
  std::int64_t top_k = 0;
  /// Of these, only the smallest set of the most probable whose mass reaches `top_p` (nucleus
  /// sampling, Holtzman et al., arXiv 1904.09751).
  double top_p = 1.0;
};

/// Throws Error if a value is out of range: temperature ≥ 0 and finite, top_k ≥ 0, 0 < top_p ≤ 1.
void check_sampling_options(const SamplingOptions& options);

/// Draws a token from `logits` with one number `uniform` in [0, 1). The same arguments give the
/// same token. −∞ excludes a token; throws Error if a logit is NaN or +∞, or if all are −∞.
std::int64_t sample_token(std::span<const float> logits, const SamplingOptions& options,
                          double uniform);

}  // namespace fastweights
