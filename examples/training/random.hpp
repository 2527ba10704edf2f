#pragma once

#include <cstdint>

namespace training {

/// SplitMix64 (Steele, Lea & Flood 2014): one word of state, so that a checkpoint holds it as it
/// is.
class Random {
 public:
  explicit Random(uint64_t state) : state_(state) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }

  /// Uniform in [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  /// Uniform in [0, bound); 0 where bound ≤ 1.
  int64_t below(int64_t bound) {
    return bound <= 1 ? 0 : static_cast<int64_t>(uniform() * static_cast<double>(bound));
  }

  uint64_t state() const { return state_; }

 private:
  uint64_t state_;
};

}  // namespace training
