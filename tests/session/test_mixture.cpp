#include <array>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/session/generator.hpp"
#include "fastweights/session/mixture.hpp"

using fastweights::Error;
using fastweights::Generator;
using fastweights::Mixture;
using Present = std::array<bool, 3>;

namespace {

Mixture even() {
  const float third = 1.0f / 3.0f;
  return Mixture({{{third, third, third}, 0.0f}, {{0.5f, 0.25f, 0.25f}, 0.0f}}, {});
}

constexpr Present kAll = {true, true, true};

}  // namespace

TEST_CASE("weights of the experts that speak sum to 1", "[mixture]") {
  Mixture mixture = even();
  Generator generator{.seed = 1};
  for (int i = 0; i < 500; ++i) {
    const Present present = {true, i % 2 == 0, i % 3 == 0};
    mixture.learn(1, present, {generator.uniform(), generator.uniform(), generator.uniform()});
    const auto weights = mixture.weights(1, present);
    CHECK(std::abs(weights[0] + weights[1] + weights[2] - 1.0) < 1e-12);
    for (std::size_t e = 0; e < 3; ++e) CHECK((weights[e] > 0.0) == present[e]);
  }
}

TEST_CASE("the weights go to the expert that is better, in each bucket", "[mixture]") {
  Mixture mixture = even();
  for (int i = 0; i < 400; ++i) {
    mixture.learn(0, kAll, {0.1, 0.6, 0.1});
    mixture.learn(1, kAll, {0.1, 0.1, 0.6});
  }
  CHECK(mixture.weights(0, kAll)[1] > 0.99);
  CHECK(mixture.weights(1, kAll)[2] > 0.99);
  // It changes its mind when the text does.
  for (int i = 0; i < 400; ++i) mixture.learn(0, kAll, {0.6, 0.1, 0.1});
  CHECK(mixture.weights(0, kAll)[0] > 0.99);
}

TEST_CASE("weights find the best mixture of two experts that are right in turn", "[mixture]") {
  Mixture mixture = even();
  Generator generator{.seed = 2};
  double mean = 0.0;
  for (int i = 0; i < 4000; ++i) {
    const bool first = generator.uniform() < 0.7;
    mixture.learn(0, {true, true, false}, {first ? 1.0 : 0.0, first ? 0.0 : 1.0, 0.0});
    if (i >= 1000) mean += mixture.weights(0, {true, true, false})[0] / 3000.0;
  }
  CHECK(std::abs(mean - 0.7) < 0.02);
}

TEST_CASE("silent experts and impossible tokens leave the weights alone", "[mixture]") {
  Mixture mixture = even();
  const auto before = mixture.buckets()[0];
  mixture.learn(0, kAll, {0.0, 0.0, 0.0});
  CHECK(mixture.buckets()[0] == before);
  for (int i = 0; i < 50; ++i) mixture.learn(0, {true, true, false}, {0.5, 0.1, 0.0});
  CHECK(std::abs(mixture.buckets()[0].weights[2] - before.weights[2]) < 1e-5f);
  CHECK(mixture.buckets()[0].weights[0] > 0.6f);
}

TEST_CASE("copies of a mixture are independent", "[mixture]") {
  Mixture mixture = even();
  Mixture copy = mixture;
  mixture.learn(0, kAll, {0.9, 0.1, 0.1});
  CHECK(copy.buckets()[0] == even().buckets()[0]);
  CHECK(mixture.buckets()[0] != copy.buckets()[0]);
}

TEST_CASE("stored weights that are none are refused", "[mixture]") {
  Mixture mixture = even();
  const auto good = Mixture::Bucket{{0.5f, 0.25f, 0.25f}, 3.0f};
  mixture.restore({good, good});
  CHECK(mixture.buckets()[0] == good);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Mixture::Bucket& bad :
       {Mixture::Bucket{{0.5f, 0.5f, 0.5f}, 0.0f}, Mixture::Bucket{{1.5f, -0.25f, -0.25f}, 0.0f},
        Mixture::Bucket{{nan, 0.5f, 0.5f}, 0.0f}, Mixture::Bucket{{0.5f, 0.25f, 0.25f}, -1.0f},
        Mixture::Bucket{{0.5f, 0.25f, 0.25f}, nan}, Mixture::Bucket{{1.0f, 0.0f, 0.0f}, 0.0f}}) {
    CHECK_THROWS_AS(mixture.restore({good, bad}), Error);
  }
  CHECK_THROWS_AS(mixture.restore({good}), Error);
  CHECK(mixture.buckets()[0] == good);
}
