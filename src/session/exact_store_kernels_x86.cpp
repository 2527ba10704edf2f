// Products of bytes with AVX-512 VNNI, which Highway 1.0 does not offer. The instruction multiplies
// unsigned by signed bytes: keys are taken 128 higher, and 128 times a query's sum is taken off.
#include "exact_store_kernels.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#include <cstring>
#endif

namespace fastweights::detail {

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

bool has_byte_products() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vnni");
}

namespace {

template <int kCount>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void multiply_block(
    const std::int8_t* page, std::int64_t groups, const std::int8_t* queries,
    std::int32_t* products) {
  constexpr int kQuads = kKeySize / 4;
  std::int32_t quads[kQuads][kCount];  // four numbers of each query, side by side
  std::int32_t offsets[kCount];
  for (int q = 0; q < kCount; ++q) {
    std::int32_t sum = 0;
    for (int i = 0; i < kKeySize; ++i) sum += queries[q * kKeySize + i];
    offsets[q] = -128 * sum;
    for (int i = 0; i < kQuads; ++i) {
      std::memcpy(&quads[i][q], queries + q * kKeySize + 4 * i, sizeof(std::int32_t));
    }
  }
  const __m512i high = _mm512_set1_epi8(static_cast<char>(0x80));
  for (std::int64_t group = 0; group < groups; ++group) {
    const std::int8_t* keys = page + group * kKeyGroup * kKeySize;
    __m512i sums[kCount];
#pragma GCC unroll 8
    for (int q = 0; q < kCount; ++q) sums[q] = _mm512_set1_epi32(offsets[q]);
#pragma GCC unroll 2
    for (int i = 0; i < kQuads; ++i) {
      const __m512i key = _mm512_xor_si512(_mm512_loadu_si512(keys + i * 64), high);
#pragma GCC unroll 8
      for (int q = 0; q < kCount; ++q) {
        sums[q] = _mm512_dpbusd_epi32(sums[q], key, _mm512_set1_epi32(quads[i][q]));
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q < kCount; ++q) {
      _mm512_storeu_si512(products + q * kKeyPage + group * kKeyGroup, sums[q]);
    }
  }
}

}  // namespace

void multiply_keys_by_bytes(const std::int8_t* page, std::int64_t groups,
                            const std::int8_t* queries, std::int64_t count,
                            std::int32_t* products) {
  if (count == kQueryBlock) return multiply_block<kQueryBlock>(page, groups, queries, products);
  for (std::int64_t q = 0; q < count; ++q) {
    multiply_block<1>(page, groups, queries + q * kKeySize, products + q * kKeyPage);
  }
}

#else

bool has_byte_products() { return false; }

void multiply_keys_by_bytes(const std::int8_t* page, std::int64_t groups,
                            const std::int8_t* queries, std::int64_t count,
                            std::int32_t* products) {
  multiply_keys_portably(page, groups, queries, count, products);
}

#endif

}  // namespace fastweights::detail
