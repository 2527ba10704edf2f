/// \file
/// The arithmetic of the exact store on raw memory: projecting hidden states to keys, comparing
/// queries with keys, and sums over a vocabulary.
#pragma once

#include <cstdint>

namespace fastweights::detail {

/// Numbers of a key, each in [−127, 127]; a page of keys; queries that are compared at once.
inline constexpr std::int64_t kKeySize = 64;
inline constexpr std::int64_t kKeyPage = 256;
inline constexpr std::int64_t kKeyGroup = 16;
inline constexpr std::int64_t kQueryBlock = 8;

/// Where number `i` of key `key` stands in its page: sixteen keys lie side by side, four numbers of
/// each at a time.
constexpr std::int64_t key_offset(std::int64_t key, std::int64_t i) {
  return key / kKeyGroup * kKeyGroup * kKeySize + i / 4 * kKeyGroup * 4 + key % kKeyGroup * 4 +
         i % 4;
}

/// key ← the projection of `hidden` [size] by `matrix` [size, 64], of unit norm, times 320, rounded
/// and limited to ±127; returns false, and leaves zeros, where the projection is 0 or not finite.
bool make_key(const float* hidden, const float* matrix, std::int64_t size, std::int8_t* key);

/// products[q][k] ← query q · key k, exactly, for the first `groups` groups of sixteen keys of a
/// page. `queries` holds `count` ≤ kQueryBlock keys one after another, `products` rows of kKeyPage.
void multiply_keys(const std::int8_t* page, std::int64_t groups, const std::int8_t* queries,
                   std::int64_t count, std::int32_t* products);

/// The first index from `begin` on with products[index] > limit, or `end`.
std::int64_t find_above(const std::int32_t* products, std::int64_t begin, std::int64_t end,
                        std::int32_t limit);

/// log Σ exp(logits).
float log_sum_exp(const float* logits, std::int64_t size);

/// out ← x + shift.
void add_to_all(const float* x, float shift, std::int64_t size, float* out);

/// multiply_keys for processors with the AVX-512 byte products (VNNI); `has_byte_products` says
/// whether this one has them.
bool has_byte_products();
void multiply_keys_by_bytes(const std::int8_t* page, std::int64_t groups,
                            const std::int8_t* queries, std::int64_t count, std::int32_t* products);

/// The form that every processor has.
void multiply_keys_portably(const std::int8_t* page, std::int64_t groups,
                            const std::int8_t* queries, std::int64_t count, std::int32_t* products);

}  // namespace fastweights::detail
