#pragma once

namespace training {

/// Linear warm-up, then a cosine (Loshchilov & Hutter 2016) from `peak` down to `peak ·
/// final_ratio`.
struct Schedule {
  double peak = 2e-3;
  double final_ratio = 0.02;
  double warmup = 0.02;  ///< share of the run

  /// Learning rate where `progress` in [0, 1] is the part of the run that is done.
  double at(double progress) const;
};

}  // namespace training
