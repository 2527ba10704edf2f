#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace training {

/// What the line shows.
struct ProgressReport {
  double done = 0.0;  ///< part of the run in [0, 1]
  int64_t step = 0;
  double bits_per_byte = 0.0;
  double bytes_per_second = 0.0;
  double learning_rate = 0.0;
  double seconds_left = 0.0;
};

/// A bar on standard error that is redrawn in place on a terminal; elsewhere a plain line every
/// `plain_seconds`, so that a log file stays readable.
class ProgressLine {
 public:
  explicit ProgressLine(double plain_seconds = 15.0);

  void update(const ProgressReport& report);
  /// A message of its own line; the bar goes on below.
  void note(const std::string& message);
  /// Leaves the last state of the bar on the screen.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;

  bool terminal_;
  bool drawn_ = false;
  std::chrono::duration<double> interval_;
  Clock::time_point last_;
  bool first_ = true;
};

/// `1:02:03`, `2:03`.
std::string clock_time(double seconds);

}  // namespace training
