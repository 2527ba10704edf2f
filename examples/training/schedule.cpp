#include "schedule.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace training {

double Schedule::at(double progress) const {
  progress = std::clamp(progress, 0.0, 1.0);
  // Starts above zero, so that the first step already learns.
  if (progress < warmup) return peak * std::max(progress / warmup, 1e-2);
  const double done = warmup < 1.0 ? (progress - warmup) / (1.0 - warmup) : 1.0;
  const double cosine = 0.5 * (1.0 + std::cos(std::numbers::pi * done));
  return peak * (final_ratio + (1.0 - final_ratio) * cosine);
}

}  // namespace training
