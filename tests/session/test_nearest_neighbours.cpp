#include <algorithm>
#include <array>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "../../src/session/exact_store_kernels.hpp"
#include "../core/executors.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/session/generator.hpp"
#include "fastweights/session/nearest_neighbours.hpp"

using fastweights::Error;
using fastweights::Generator;
using fastweights::NearestNeighbours;
using fastweights::NearestNeighboursOptions;
using fastweights::Neighbour;
namespace core = fastweights::core;

namespace {

constexpr std::int64_t kHidden = 24;

std::vector<float> random_states(std::int64_t count, std::uint64_t seed) {
  Generator generator{.seed = seed};
  std::vector<float> states(static_cast<std::size_t>(count * kHidden));
  for (float& value : states) value = static_cast<float>(generator.uniform() - 0.5);
  return states;
}

std::int32_t product(std::span<const std::int8_t> a, std::span<const std::int8_t> b) {
  std::int32_t sum = 0;
  for (std::size_t i = 0; i < 64; ++i) sum += int{a[i]} * int{b[i]};
  return sum;
}

/// All entries [begin, end) of the keys, sorted.
std::vector<Neighbour> oracle(std::span<const std::int8_t> keys, std::int64_t begin,
                              std::int64_t end, std::span<const std::int8_t> query,
                              std::size_t count) {
  std::vector<Neighbour> all;
  for (std::int64_t entry = begin; entry < end; ++entry) {
    all.push_back({entry, product(keys.subspan(static_cast<std::size_t>(entry * 64), 64), query)});
  }
  std::ranges::sort(all, [](const Neighbour& a, const Neighbour& b) {
    return a.product != b.product ? a.product > b.product : a.entry > b.entry;
  });
  all.resize(std::min(count, all.size()));
  return all;
}

}  // namespace

TEST_CASE("every form multiplies keys exactly", "[nearest_neighbours]") {
  Generator generator{.seed = 4};
  const auto byte = [&](bool extreme) {
    const double u = generator.uniform();
    if (extreme) return static_cast<std::int8_t>(u < 0.5 ? -127 : 127);
    return static_cast<std::int8_t>(std::floor(u * 255.0) - 127.0);
  };
  for (const bool extreme : {false, true}) {
    std::vector<std::int8_t> keys(fastweights::detail::kKeyPage * fastweights::detail::kKeySize);
    std::vector<std::int8_t> queries(fastweights::detail::kQueryBlock *
                                     fastweights::detail::kKeySize);
    for (auto& value : queries) value = byte(extreme);
    for (auto& value : keys) value = byte(extreme);
    if (extreme) std::copy_n(queries.begin(), 64, keys.begin());
    std::vector<std::int8_t> page(keys.size());
    for (std::int64_t key = 0; key < fastweights::detail::kKeyPage; ++key) {
      for (std::int64_t i = 0; i < 64; ++i) {
        page[static_cast<std::size_t>(fastweights::detail::key_offset(key, i))] =
            keys[static_cast<std::size_t>(key * 64 + i)];
      }
    }
    for (const auto multiply :
         {fastweights::detail::multiply_keys_portably, fastweights::detail::multiply_keys_by_bytes,
          fastweights::detail::multiply_keys}) {
      if (multiply == fastweights::detail::multiply_keys_by_bytes &&
          !fastweights::detail::has_byte_products())
        continue;
      for (const std::int64_t count :
           {std::int64_t{1}, std::int64_t{3}, fastweights::detail::kQueryBlock}) {
        constexpr std::int32_t kUntouched = -1234567;
        std::vector<std::int32_t> products(
            static_cast<std::size_t>(fastweights::detail::kQueryBlock *
                                     fastweights::detail::kKeyPage),
            kUntouched);
        const std::int64_t groups = 5;
        multiply(page.data(), groups, queries.data(), count, products.data());
        for (std::int64_t q = 0; q < fastweights::detail::kQueryBlock; ++q) {
          for (std::int64_t key = 0; key < fastweights::detail::kKeyPage; ++key) {
            const bool asked = q < count && key < groups * fastweights::detail::kKeyGroup;
            const auto at = [](auto& from, std::int64_t row) {
              return std::span(from).subspan(static_cast<std::size_t>(row * 64), 64);
            };
            const auto expected = asked ? product(at(keys, key), at(queries, q)) : kUntouched;
            REQUIRE(products[static_cast<std::size_t>(q * fastweights::detail::kKeyPage + key)] ==
                    expected);
          }
        }
      }
    }
  }
}

TEST_CASE("a key keeps the direction of a hidden state", "[nearest_neighbours]") {
  const NearestNeighbours neighbours(kHidden, 256, {});
  auto states = random_states(200, 5);
  const auto keys = neighbours.make_keys(states, core::serial_executor());
  for (float& value : states) value *= -3.0f;
  const auto opposite = neighbours.make_keys(states, core::serial_executor());
  double error = 0.0;
  for (std::int64_t i = 0; i < 200; ++i) {
    for (std::size_t j = 0; j < 64; ++j) REQUIRE(opposite.key(i)[j] == -keys.key(i)[j]);
    const double self = product(keys.key(i), keys.key(i)) / NearestNeighbours::kScale;
    CHECK(self < 1.01);
    CHECK(self > 0.85);  // numbers beyond 127 are cut
    double dot = 0.0;
    double squares[2] = {0.0, 0.0};
    for (std::int64_t k = 0; k < kHidden; ++k) {
      const auto a = static_cast<double>(states[static_cast<std::size_t>(i * kHidden + k)]);
      const auto b = static_cast<double>(states[static_cast<std::size_t>(k)]);
      dot += a * b;
      squares[0] += a * a;
      squares[1] += b * b;
    }
    const double cosine = product(keys.key(i), keys.key(0)) / NearestNeighbours::kScale;
    error += std::pow(cosine - dot / std::sqrt(squares[0] * squares[1]), 2.0);
  }
  CHECK(std::sqrt(error / 200.0) < 0.15);  // 1/√64 is what a projection to 64 numbers promises
}

TEST_CASE("a state without a direction has no key", "[nearest_neighbours]") {
  const NearestNeighbours neighbours(kHidden, 256, {});
  auto states = random_states(3, 6);
  std::fill_n(states.begin(), kHidden, 0.0f);
  states[kHidden + 3] = std::numeric_limits<float>::quiet_NaN();
  const auto keys = neighbours.make_keys(states, core::serial_executor());
  CHECK(keys.usable == std::vector<std::uint8_t>{0, 0, 1});
  CHECK(std::ranges::count(keys.key(0), 0) == 64);
  CHECK(std::ranges::count(keys.key(1), 0) == 64);
}

TEST_CASE("the nearest are those that a look at all finds", "[nearest_neighbours]") {
  constexpr std::int64_t kCount = 1100;
  auto states = random_states(kCount, 7);
  // Equal states: of equal products the more recent counts as nearer.
  for (std::int64_t i = 40; i < kCount; i += 3) {
    std::copy_n(states.begin() + i % 40 * kHidden, kHidden, states.begin() + i * kHidden);
  }
  for (const std::int64_t pages : {2, 100}) {
    CAPTURE(pages);
    const NearestNeighboursOptions options{.count = 20, .bytes = pages * 256 * 65};
    const NearestNeighbours empty(kHidden, 256, options);
    const auto keys = empty.make_keys(states, fastweights::test::two_threads());
    auto batch = empty;
    auto single = empty;
    std::vector<std::int64_t> ends;
    std::int64_t largest = 0;
    for (std::int64_t i = 0; i < kCount; ++i) {
      ends.push_back(i);
      const auto key = keys.key(i);
      const auto begin = std::max<std::int64_t>(0, (i + 255) / 256 - pages) * 256;
      const auto expected = oracle(keys.numbers, begin, i, key, 20);
      const std::array<std::int64_t, 1> end = {i};
      REQUIRE((single.find(key, end, core::serial_executor())[0] == expected));
      REQUIRE((single.find(key, end, fastweights::test::two_threads())[0] == expected));
      single.append(key, i % 256);
      single.drop_old();
      batch.append(key, i % 256);
      largest = std::max(largest, single.bytes());
    }
    CHECK((pages > 2 || largest <= options.bytes));
    for (const auto& executor : {core::serial_executor(), fastweights::test::two_threads()}) {
      const auto found = batch.find(keys.numbers, ends, executor);
      for (std::int64_t i = 0; i < kCount; ++i) {
        const auto begin = std::max<std::int64_t>(0, (i + 255) / 256 - pages) * 256;
        REQUIRE((found[static_cast<std::size_t>(i)] ==
                 oracle(keys.numbers, begin, i, keys.key(i), 20)));
      }
    }
    CHECK(batch.token(kCount - 1) == (kCount - 1) % 256);
    CHECK(std::ranges::equal(batch.key(kCount - 2), keys.key(kCount - 2)));
  }
}

TEST_CASE("entries that were dropped are missed by name", "[nearest_neighbours]") {
  NearestNeighbours neighbours(kHidden, 256, {.bytes = 2 * 256 * 65});
  const auto keys = neighbours.make_keys(random_states(900, 8), core::serial_executor());
  for (std::int64_t i = 0; i < 900; ++i) neighbours.append(keys.key(i), 1);
  neighbours.drop_old();
  CHECK(neighbours.begin() == 512);
  CHECK_THROWS_AS(neighbours.truncate(600), Error);
  CHECK_THROWS_AS(neighbours.truncate(901), Error);
  neighbours.truncate(800);
  CHECK(neighbours.size() == 800);
}

TEST_CASE("options of neighbours out of range are refused", "[nearest_neighbours]") {
  CHECK_THROWS_AS(NearestNeighbours(0, 256, {}), Error);
  CHECK_THROWS_AS(NearestNeighbours(8, 0, {}), Error);
  CHECK_THROWS_AS(NearestNeighbours(8, 256, {.count = 0}), Error);
  CHECK_THROWS_AS(NearestNeighbours(8, 256, {.bytes = -1}), Error);
}
