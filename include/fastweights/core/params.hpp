#pragma once

#include <cstdint>
#include <span>

namespace fastweights::core {

/// Sizes of one call: B batch rows, T tokens, H key heads, HV value heads (a multiple of H; value
/// head j reads key head j / (HV / H)), K and V the sizes of a key and of a value.
struct Shape {
  std::int64_t B = 0;
  std::int64_t T = 0;
  std::int64_t H = 0;
  std::int64_t HV = 0;
  std::int64_t K = 0;
  std::int64_t V = 0;
};

/// The tokens of one sequence: row `batch`, tokens `begin … begin + length - 1`.
struct Sequence {
  std::int64_t batch = 0;
  std::int64_t begin = 0;
  std::int64_t length = 0;
};

/// The largest K and V that the kernels take.
inline constexpr std::int64_t kMaxHeadSize = 256;

/// The sizes of one call and how its tokens are cut into sequences.
struct Packing {
  Shape shape;
  std::span<const std::int64_t> cu_seqlens;  // [N + 1], empty when the input is not packed

  /// N: the number of sequences, and so of states.
  std::int64_t sequences() const {
    return cu_seqlens.empty() ? shape.B : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  }
  Sequence sequence(std::int64_t n) const {
    if (cu_seqlens.empty()) return {n, 0, shape.T};
    const auto i = static_cast<std::size_t>(n);
    return {0, cu_seqlens[i], cu_seqlens[i + 1] - cu_seqlens[i]};
  }
  std::int64_t value_heads_per_key_head() const { return shape.HV / shape.H; }
  std::int64_t state_offset(std::int64_t n, std::int64_t value_head) const {
    return (n * shape.HV + value_head) * shape.K * shape.V;
  }
};

}  // namespace fastweights::core
