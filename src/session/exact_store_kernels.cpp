#include "exact_store_kernels.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "exact_store_kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

#include <algorithm>
#include <cmath>
#include <limits>

HWY_BEFORE_NAMESPACE();
namespace fastweights::detail::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using Float = hn::ScalableTag<float>;
/// What a key's norm is before it is rounded: in 64 dimensions a number is some 40 then.
constexpr float kKeyNorm = 320.0f;
constexpr float kMost = 127.0f;

void project(const float* hidden, const float* matrix, std::int64_t size, float* out) {
  const Float d;
  const auto step = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t column = 0; column < kKeySize; column += step) {
    auto even = hn::Zero(d);
    auto odd = hn::Zero(d);
    std::int64_t i = 0;
    for (; i + 2 <= size; i += 2) {
      const float* row = matrix + i * kKeySize + column;
      even = hn::MulAdd(hn::Set(d, hidden[i]), hn::LoadU(d, row), even);
      odd = hn::MulAdd(hn::Set(d, hidden[i + 1]), hn::LoadU(d, row + kKeySize), odd);
    }
    if (i < size) {
      even = hn::MulAdd(hn::Set(d, hidden[i]), hn::LoadU(d, matrix + i * kKeySize + column), even);
    }
    hn::StoreU(hn::Add(even, odd), d, out + column);
  }
}

bool make(const float* hidden, const float* matrix, std::int64_t size, std::int8_t* key) {
  float projected[std::max<std::int64_t>(kKeySize, HWY_MAX_BYTES / 4)];
  project(hidden, matrix, size, projected);
  double squares = 0.0;
  for (std::int64_t i = 0; i < kKeySize; ++i) {
    squares += static_cast<double>(projected[i]) * static_cast<double>(projected[i]);
  }
  const bool usable = std::isfinite(squares) && squares > 0.0;
  const auto scale =
      usable ? static_cast<float>(static_cast<double>(kKeyNorm) / std::sqrt(squares)) : 0.0f;
  for (std::int64_t i = 0; i < kKeySize; ++i) {
    const float value = usable ? std::clamp(projected[i] * scale, -kMost, kMost) : 0.0f;
    key[i] = static_cast<std::int8_t>(std::lrint(value));
  }
  return usable;
}

#if HWY_TARGET == HWY_SCALAR

void multiply(const std::int8_t* page, std::int64_t groups, const std::int8_t* queries,
              std::int64_t count, std::int32_t* products) {
  for (std::int64_t q = 0; q < count; ++q) {
    for (std::int64_t key = 0; key < groups * kKeyGroup; ++key) {
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < kKeySize; ++i) {
        sum += page[key_offset(key, i)] * queries[q * kKeySize + i];
      }
      products[q * kKeyPage + key] = sum;
    }
  }
}

#else

using Int = hn::CappedTag<std::int32_t, kKeyGroup>;  // one key to a lane
using Short = hn::Repartition<std::int16_t, Int>;

/// Two numbers of a query, for the halves of a lane.
std::int32_t pair(int low, int high) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(high) << 16 |
                                   (static_cast<std::uint32_t>(low) & 0xFFFFU));
}

/// The sums of one query with as many keys as there are lanes. A product of two bytes and the sum
/// of two products fit into 16 bits, since no byte is −128.
HWY_INLINE hn::Vec<Int> sums(const std::int8_t* keys, const std::int8_t* query) {
  const Int d;
  const Short half;
  const hn::Repartition<std::int8_t, Int> bytes;
  auto sum = hn::Zero(d);
  for (std::int64_t i = 0; i < kKeySize; i += 4) {
    const std::int8_t* x = query + i;
    const auto key = hn::BitCast(half, hn::LoadU(bytes, keys + i * kKeyGroup));
    const auto even = hn::ShiftRight<8>(hn::ShiftLeft<8>(key));
    const auto odd = hn::ShiftRight<8>(key);
    const auto first = hn::BitCast(half, hn::Set(d, pair(x[0], x[2])));
    const auto second = hn::BitCast(half, hn::Set(d, pair(x[1], x[3])));
    const auto pairs = hn::BitCast(d, hn::Add(hn::Mul(even, first), hn::Mul(odd, second)));
    sum = hn::Add(sum,
                  hn::Add(hn::ShiftRight<16>(hn::ShiftLeft<16>(pairs)), hn::ShiftRight<16>(pairs)));
  }
  return sum;
}

void multiply(const std::int8_t* page, std::int64_t groups, const std::int8_t* queries,
              std::int64_t count, std::int32_t* products) {
  const Int d;
  const auto step = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t group = 0; group < groups; ++group) {
    for (std::int64_t lane = 0; lane < kKeyGroup; lane += step) {
      const std::int8_t* keys = page + group * kKeyGroup * kKeySize + lane * 4;
      std::int32_t* out = products + group * kKeyGroup + lane;
      for (std::int64_t q = 0; q < count; ++q) {
        hn::StoreU(sums(keys, queries + q * kKeySize), d, out + q * kKeyPage);
      }
    }
  }
}

#endif

std::int64_t find(const std::int32_t* products, std::int64_t begin, std::int64_t end,
                  std::int32_t limit) {
  const hn::ScalableTag<std::int32_t> d;
  const auto step = static_cast<std::int64_t>(hn::Lanes(d));
  const auto most = hn::Set(d, limit);
  std::int64_t i = begin;
  for (; i + step <= end; i += step) {
    const auto found = hn::FindFirstTrue(d, hn::Gt(hn::LoadU(d, products + i), most));
    if (found >= 0) return i + found;
  }
  while (i < end && products[i] <= limit) ++i;
  return i;
}

float sum_of_exponentials(const float* logits, std::int64_t size) {
  const Float d;
  const auto step = static_cast<std::int64_t>(hn::Lanes(d));
  const float largest = *std::max_element(logits, logits + size);
  if (!std::isfinite(largest)) return largest;
  const auto shift = hn::Set(d, largest);
  auto sum = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + step <= size; i += step) {
    sum = hn::Add(sum, hn::Exp(d, hn::Sub(hn::LoadU(d, logits + i), shift)));
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < size; ++i) total += std::exp(logits[i] - largest);
  return largest + std::log(total);
}

void add(const float* x, float shift, std::int64_t size, float* out) {
  const Float d;
  const auto step = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + step <= size; i += step) {
    hn::StoreU(hn::Add(hn::LoadU(d, x + i), hn::Set(d, shift)), d, out + i);
  }
  for (; i < size; ++i) out[i] = x[i] + shift;
}

}  // namespace
}  // namespace fastweights::detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::detail {

HWY_EXPORT(make);
HWY_EXPORT(multiply);
HWY_EXPORT(find);
HWY_EXPORT(sum_of_exponentials);
HWY_EXPORT(add);

bool make_key(const float* hidden, const float* matrix, std::int64_t size, std::int8_t* key) {
  return HWY_DYNAMIC_DISPATCH(make)(hidden, matrix, size, key);
}

void multiply_keys_portably(const std::int8_t* page, std::int64_t groups,
                            const std::int8_t* queries, std::int64_t count,
                            std::int32_t* products) {
  HWY_DYNAMIC_DISPATCH(multiply)(page, groups, queries, count, products);
}

void multiply_keys(const std::int8_t* page, std::int64_t groups, const std::int8_t* queries,
                   std::int64_t count, std::int32_t* products) {
  static const bool by_bytes = has_byte_products();
  if (by_bytes) {
    multiply_keys_by_bytes(page, groups, queries, count, products);
  } else {
    multiply_keys_portably(page, groups, queries, count, products);
  }
}

std::int64_t find_above(const std::int32_t* products, std::int64_t begin, std::int64_t end,
                        std::int32_t limit) {
  return HWY_DYNAMIC_DISPATCH(find)(products, begin, end, limit);
}

float log_sum_exp(const float* logits, std::int64_t size) {
  return HWY_DYNAMIC_DISPATCH(sum_of_exponentials)(logits, size);
}

void add_to_all(const float* x, float shift, std::int64_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(add)(x, shift, size, out);
}

}  // namespace fastweights::detail

#endif  // HWY_ONCE
