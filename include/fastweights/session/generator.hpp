#pragma once

#include <cstdint>

namespace fastweights {

/// A counter-based source of random numbers: the n-th number is a function of (seed, n) alone.
///
/// So the whole state of a generator is two integers, and the generator of a session is a function
/// of its log: each written token draws exactly once. The mixing function is SplitMix64's (Steele,
/// Lea and Flood, "Fast splittable pseudorandom number generators", 2014); the seed is mixed first,
/// so that neighbouring seeds give unrelated sequences.
struct Generator {
  std::uint64_t seed = 0;
  std::uint64_t draws = 0;

  /// The next number, uniform in [0, 1), with 53 random bits.
  double uniform() {
    ++draws;
    const std::uint64_t bits = mix(mix(seed) + draws * kIncrement);
    return static_cast<double>(bits >> 11) * 0x1.0p-53;
  }

  bool operator==(const Generator&) const = default;

 private:
  static constexpr std::uint64_t kIncrement = 0x9E3779B97F4A7C15U;  // 2^64 / golden ratio, odd

  static constexpr std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }
};

}  // namespace fastweights
