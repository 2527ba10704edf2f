#include <array>
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/session/generator.hpp"
#include "fastweights/session/sampling.hpp"

using fastweights::Error;
using fastweights::Generator;
using fastweights::sample_token;
using fastweights::SamplingOptions;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// How often each token comes in `count` draws, as a fraction.
std::vector<double> frequencies(const std::vector<float>& logits, const SamplingOptions& options,
                                int count = 20000) {
  Generator generator{.seed = 1};
  std::vector<double> seen(logits.size());
  for (int i = 0; i < count; ++i) {
    const auto token = static_cast<std::size_t>(sample_token(logits, options, generator.uniform()));
    seen[token] += 1.0 / count;
  }
  return seen;
}

/// Logits of given probabilities.
std::vector<float> logits_of(const std::vector<double>& probabilities) {
  std::vector<float> out;
  for (const double p : probabilities) out.push_back(static_cast<float>(std::log(p)));
  return out;
}

}  // namespace

TEST_CASE("a generator is a function of its seed and its count", "[sampling]") {
  Generator a{.seed = 5};
  Generator b{.seed = 5};
  Generator c{.seed = 6};
  double sum = 0.0;
  double sum_of_squares = 0.0;
  for (int i = 0; i < 10000; ++i) {
    const double x = a.uniform();
    REQUIRE(x >= 0.0);
    REQUIRE(x < 1.0);
    REQUIRE(x == b.uniform());
    REQUIRE(x != c.uniform());
    sum += x;
    sum_of_squares += x * x;
  }
  CHECK(sum / 10000 == Catch::Approx(0.5).margin(0.015));
  CHECK(sum_of_squares / 10000 == Catch::Approx(1.0 / 3).margin(0.015));
  Generator resumed{.seed = 5, .draws = 10000};
  CHECK(resumed.uniform() == a.uniform());
  CHECK(resumed == a);
}

TEST_CASE("tokens come as often as their probabilities say", "[sampling]") {
  const std::vector<double> p{0.5, 0.3, 0.15, 0.05};
  const auto seen = frequencies(logits_of(p), {});
  for (std::size_t i = 0; i < p.size(); ++i) CHECK(seen[i] == Catch::Approx(p[i]).margin(0.015));

  const auto sharp = frequencies(logits_of(p), {.temperature = 0.5});  // p² renormalised
  CHECK(sharp[0] == Catch::Approx(0.25 / 0.365).margin(0.015));
  CHECK(sharp[3] == Catch::Approx(0.0025 / 0.365).margin(0.01));
}

TEST_CASE("temperature 0 takes the first of the most probable", "[sampling]") {
  const std::vector<float> logits{1.0F, 3.0F, 3.0F, -1.0F};
  CHECK(sample_token(logits, {.temperature = 0.0}, 0.99) == 1);
  CHECK(sample_token(logits, {.temperature = 1e-300}, 0.25) == 1);
}

TEST_CASE("top_k and top_p cut the tail", "[sampling]") {
  const std::vector<float> logits = logits_of({0.1, 0.4, 0.2, 0.3});
  const auto two = frequencies(logits, {.top_k = 2});
  CHECK(two[0] == 0.0);
  CHECK(two[2] == 0.0);
  CHECK(two[1] == Catch::Approx(0.4 / 0.7).margin(0.015));
  const auto nucleus = frequencies(logits, {.top_p = 0.65});
  CHECK(nucleus[0] + nucleus[2] == 0.0);
  CHECK(nucleus[3] == Catch::Approx(0.3 / 0.7).margin(0.015));
  CHECK(sample_token(logits, {.top_p = 1e-9}, 0.999) == 1);
  CHECK(sample_token(logits, {.top_k = 100}, 0.0) == 0);
  const auto both = frequencies(logits, {.top_k = 3, .top_p = 0.5});  // 4/9 < 0.5 ≤ 7/9
  CHECK(both[1] == Catch::Approx(4.0 / 7).margin(0.015));
  CHECK(both[2] == 0.0);
}

TEST_CASE("excluded tokens are never drawn", "[sampling]") {
  const std::vector<float> logits{-kInfinity, 0.0F, -kInfinity};
  for (const double u : {0.0, 0.5, 0.9999999999999999}) CHECK(sample_token(logits, {}, u) == 1);
}

TEST_CASE("impossible logits and options are refused", "[sampling]") {
  const std::vector<float> fine{0.0F, 1.0F};
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_AS(sample_token(std::vector<float>{0.0F, nan}, {}, 0.5), Error);
  CHECK_THROWS_AS(sample_token(std::vector<float>{0.0F, kInfinity}, {}, 0.5), Error);
  CHECK_THROWS_AS(sample_token(std::vector<float>{-kInfinity}, {}, 0.5), Error);
  CHECK_THROWS_AS(sample_token({}, {}, 0.5), Error);
  CHECK_THROWS_AS(sample_token(fine, {.temperature = -1.0}, 0.5), Error);
  CHECK_THROWS_AS(sample_token(fine, {.temperature = std::nan("")}, 0.5), Error);
  CHECK_THROWS_AS(sample_token(fine, {.temperature = HUGE_VAL}, 0.5), Error);
  CHECK_THROWS_AS(sample_token(fine, {.top_k = -1}, 0.5), Error);
  CHECK_THROWS_AS(sample_token(fine, {.top_p = 0.0}, 0.5), Error);
  CHECK_THROWS_AS(sample_token(fine, {.top_p = 1.5}, 0.5), Error);
}
