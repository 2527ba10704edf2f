#pragma once

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstddef>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

// What the tests of rules that take their inputs by name share.

namespace fastweights::test {

/// RMS(error) / RMS(exact), 0 for two empty or zero tensors.
template <class Real>
double error_ratio(const std::vector<Real>& got, const std::vector<double>& exact) {
  if (got.size() != exact.size()) return std::numeric_limits<double>::infinity();
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - exact[i], 2);
    size += exact[i] * exact[i];
  }
  return error == 0 ? 0 : std::sqrt(error / size);
}

/// Each input's gradient against the central difference of `loss(case)` along a random direction.
template <class Case, class Loss>
void check_differences(const Case& c, const std::map<std::string, std::vector<double>>& gradients,
                       const Loss& loss) {
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  for (const auto& [name, values] : c.inputs) {
    CAPTURE(name);
    double expected = 0;
    double norm = 0;
    Case moved = c;
    std::vector<double> direction;
    for (const double slope : gradients.at(name)) {
      direction.push_back(normal(random));
      expected += slope * direction.back();
      norm += slope * slope;
    }
    const double step = 1e-6;
    double difference = 0;
    for (const double sign : {1.0, -1.0}) {
      for (std::size_t i = 0; i < direction.size(); ++i) {
        moved.inputs[name][i] = values[i] + sign * step * direction[i];
      }
      difference += sign * loss(moved);
    }
    CHECK(std::abs(difference / (2 * step) - expected) <= 1e-6 * std::sqrt(norm) + 1e-7);
  }
}

}  // namespace fastweights::test
