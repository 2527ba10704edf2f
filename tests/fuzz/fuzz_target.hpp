/// \file
/// What the fuzz targets share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <vector>

/// The entry point that libFuzzer, or replay.cpp, calls with one input.
// NOLINTNEXTLINE(readability-identifier-naming): libFuzzer's name
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fastweights::fuzz {

/// Ends the run as a failure: the input did something worse than being refused.
inline void require(bool condition, const char* promise) {
  if (condition) return;
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

/// The input behind a length that makes all of it up to the last '}' the header of a safetensors
/// file. A fuzzer that changes the header would have to hit upon the right length each time.
inline std::vector<std::byte> with_header_length(std::span<const std::byte> input) {
  std::size_t length = input.size();
  while (length > 0 && input[length - 1] != std::byte{'}'}) --length;
  std::vector<std::byte> file;
  for (int shift = 0; shift < 64; shift += 8) {
    file.push_back(static_cast<std::byte>(static_cast<std::uint64_t>(length) >> shift));
  }
  file.insert(file.end(), input.begin(), input.end());
  return file;
}

}  // namespace fastweights::fuzz
