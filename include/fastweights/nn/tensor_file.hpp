#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "fastweights/nn/state.hpp"

namespace fastweights::nn {

/// Writes tensors to a safetensors file, atomically: if it fails, an older file stays whole.
/// @throws FileError naming the path and the cause
void save_tensors(const std::filesystem::path& path, const NamedTensors& tensors,
                  const std::map<std::string, std::string>& metadata = {});

/// Reads all tensors of a safetensors file, as copies in memory, in the file's order.
/// @throws FileError if the file is missing or malformed
NamedTensors load_tensors(const std::filesystem::path& path);

}  // namespace fastweights::nn
