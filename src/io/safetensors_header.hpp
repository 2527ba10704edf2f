#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "fastweights/io/safetensors.hpp"

namespace fastweights::io::detail {

struct SafetensorsHeader {
  /// In the header's order; names may repeat, and sizes are not checked.
  std::vector<TensorInfo> tensors;
  Metadata metadata;
};

/// Reads the JSON of a header. Throws FileError that begins with `source`.
SafetensorsHeader parse_safetensors_header(std::string_view json, std::string_view source);

/// Throws the FileError of a malformed file.
[[noreturn]] void refuse(std::string_view source, std::string_view what);

}  // namespace fastweights::io::detail
