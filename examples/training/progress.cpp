#include "progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

namespace training {
namespace {

constexpr double kRedrawSeconds = 0.2;
constexpr int kBarWidth = 24;

std::string bar(double done) {
  const int filled = static_cast<int>(std::clamp(done, 0.0, 1.0) * kBarWidth);
  return "[" + std::string(filled, '#') + std::string(kBarWidth - filled, '.') + "]";
}

std::string describe(const ProgressReport& report) {
  return fmt::format("{:5.1f}%  step {}  {:.3f} bits/byte  {:.0f} bytes/s  lr {:.2e}  {} left",
                     100.0 * report.done, report.step, report.bits_per_byte,
                     report.bytes_per_second, report.learning_rate,
                     clock_time(report.seconds_left));
}

}  // namespace

std::string clock_time(double seconds) {
  const auto total = std::isfinite(seconds) ? std::max(0L, std::lround(seconds)) : 0L;
  const auto [h, m, s] = std::array{total / 3600, total / 60 % 60, total % 60};
  return h > 0 ? fmt::format("{}:{:02}:{:02}", h, m, s) : fmt::format("{}:{:02}", m, s);
}

ProgressLine::ProgressLine(double plain_seconds)
    : terminal_(isatty(STDERR_FILENO) != 0),
      interval_(terminal_ ? kRedrawSeconds : plain_seconds),
      last_(Clock::now()) {}

void ProgressLine::update(const ProgressReport& report) {
  const auto now = Clock::now();
  if (!first_ && now - last_ < interval_) return;
  first_ = false;
  last_ = now;
  if (terminal_) {
    fmt::print(stderr, "\r\x1b[K{} {}", bar(report.done), describe(report));
  } else {
    fmt::print(stderr, "{}\n", describe(report));
  }
  std::fflush(stderr);
  drawn_ = terminal_;
}

void ProgressLine::note(const std::string& message) {
  fmt::print(stderr, "{}{}\n", drawn_ ? "\r\x1b[K" : "", message);
  std::fflush(stderr);
  drawn_ = false;
}

void ProgressLine::finish() {
  if (drawn_) fmt::print(stderr, "\n");
  drawn_ = false;
}

}  // namespace training
