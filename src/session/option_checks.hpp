#pragma once

#include <cstdint>
#include <string>

#include "fastweights/core/error.hpp"

namespace fastweights::detail {

/// Throws Error unless the option `name` of `owner` lies in [least, most].
inline void check_option(const char* owner, const char* name, std::int64_t value,
                         std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return;
  throw Error(std::string(owner) + ": " + name + " must be in [" + std::to_string(least) + ", " +
              std::to_string(most) + "], got " + std::to_string(value));
}

}  // namespace fastweights::detail
