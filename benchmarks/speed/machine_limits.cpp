// Measures what bounds every kernel on this machine, and prints it as JSON: multiply-add throughput
// in fp32 and the rates of copying and of reading, in cache and out of it.
//
// usage: machine_limits [THREADS]

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "machine_limits.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

HWY_BEFORE_NAMESPACE();
namespace limits::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

/// Multiply-adds in independent chains, enough of them to hide the latency; returns the flop done.
double multiply_add(std::int64_t steps, float* result) {
  constexpr int kChains = 12;
  const hn::ScalableTag<float> d;
  hn::Vec<decltype(d)> sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = hn::Set(d, static_cast<float>(i));
  const auto factor = hn::Set(d, 0.999f);
  const auto term = hn::Set(d, 0.001f);
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = hn::MulAdd(sum[i], factor, term);
  }
  auto total = hn::Zero(d);
  for (int i = 0; i < kChains; ++i) total = hn::Add(total, sum[i]);
  *result = hn::GetLane(total);
  return 2.0 * kChains * static_cast<double>(hn::Lanes(d)) * static_cast<double>(steps);
}

/// The sum of `count` floats, a multiple of 1024; they are asked for 8 KiB ahead, which the
/// hardware alone does not do across pages.
float sum(const float* from, std::int64_t count) {
  constexpr int kChains = 8;
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  hn::Vec<decltype(d)> sums[kChains];
  for (auto& each : sums) each = hn::Zero(d);
  for (std::int64_t at = 0; at < count; at += kChains * lanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
      hwy::Prefetch(from + at + i * lanes + 2048);
      sums[i] = hn::Add(sums[i], hn::LoadU(d, from + at + i * lanes));
    }
  }
  auto total = hn::Zero(d);
  for (const auto& each : sums) total = hn::Add(total, each);
  return hn::GetLane(hn::SumOfLanes(d, total));
}

}  // namespace limits::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace limits {

HWY_EXPORT(multiply_add);
HWY_EXPORT(sum);

using Clock = std::chrono::steady_clock;

/// The shortest of several runs of `work` on so many threads at once, in seconds.
double best_seconds(int threads, int runs, const std::function<void(int)>& work) {
  double best = 1e30;
  for (int run = 0; run < runs; ++run) {
    std::barrier start(threads + 1);
    std::vector<std::thread> workers;
    for (int thread = 0; thread < threads; ++thread) {
      workers.emplace_back([&, thread] {
        start.arrive_and_wait();
        work(thread);
      });
    }
    start.arrive_and_wait();
    const auto begin = Clock::now();
    for (auto& worker : workers) worker.join();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

double multiply_add_rate(int threads) {
  constexpr std::int64_t kSteps = 20'000'000;
  std::vector<float> results(static_cast<std::size_t>(threads) * 16);
  std::vector<double> flop(static_cast<std::size_t>(threads));
  const double seconds = best_seconds(threads, 5, [&](int thread) {
    const auto i = static_cast<std::size_t>(thread);
    flop[i] = HWY_DYNAMIC_DISPATCH(multiply_add)(kSteps, &results[i * 16]);
  });
  double total = 0;
  for (const double f : flop) total += f;
  return total / seconds;
}

/// Bytes copied a second (each read once and written once), `bytes` for each thread at a time.
double copy_rate(int threads, std::size_t bytes) {
  const auto repeats = std::max<std::size_t>(1, (std::size_t{1} << 31) / bytes);
  const auto count = static_cast<std::size_t>(threads);
  std::vector<std::unique_ptr<char[]>> from(count), to(count);
  for (std::size_t i = 0; i < count; ++i) {
    from[i] = std::make_unique<char[]>(bytes);
    to[i] = std::make_unique<char[]>(bytes);
  }
  const double seconds = best_seconds(threads, 3, [&](int thread) {
    const auto i = static_cast<std::size_t>(thread);
    for (std::size_t r = 0; r < repeats; ++r) {
      std::memcpy(to[i].get(), from[i].get(), bytes);
      from[i][r % bytes] = to[i][(r * 7) % bytes];  // so that no copy is superfluous
    }
  });
  return static_cast<double>(repeats * bytes * count) / seconds;
}

/// Bytes read a second, `bytes` for each thread at a time.
double read_rate(int threads, std::size_t bytes) {
  const auto repeats = std::max<std::size_t>(1, (std::size_t{1} << 31) / bytes);
  const auto count = static_cast<std::size_t>(threads);
  std::vector<std::vector<float>> from(count, std::vector<float>(bytes / sizeof(float), 1.0f));
  std::vector<float> results(count * 16);
  const double seconds = best_seconds(threads, 3, [&](int thread) {
    const auto i = static_cast<std::size_t>(thread);
    for (std::size_t r = 0; r < repeats; ++r) {
      results[i * 16] += HWY_DYNAMIC_DISPATCH(sum)(from[i].data(), std::ssize(from[i]));
    }
  });
  return static_cast<double>(repeats * bytes * count) / seconds;
}

}  // namespace limits

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  if (threads < 1) {
    std::cerr << "usage: machine_limits [THREADS]\n";
    return EXIT_FAILURE;
  }
  const nlohmann::json figures = {
      {"threads", threads},
      {"multiply_add_flop_per_second", limits::multiply_add_rate(threads)},
      {"copy_bytes_per_second_in_cache", limits::copy_rate(threads, std::size_t{256} << 10)},
      {"copy_bytes_per_second_in_memory", limits::copy_rate(threads, std::size_t{256} << 20)},
      {"read_bytes_per_second_in_memory", limits::read_rate(threads, std::size_t{64} << 20)}};
  std::cout << figures.dump(1) << '\n';
  return EXIT_SUCCESS;
}

#endif  // HWY_ONCE
