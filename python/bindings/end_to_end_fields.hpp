#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "fastweights/session/end_to_end.hpp"

namespace fastweights::python {

/// The fields of Python's EndToEndOptions: learning_rate, every, clip.
using EndToEndFields = std::tuple<double, std::int64_t, double>;

inline std::optional<EndToEndOptions> to_end_to_end(const std::optional<EndToEndFields>& fields) {
  if (!fields) return std::nullopt;
  const auto& [learning_rate, every, clip] = *fields;
  return EndToEndOptions{learning_rate, every, clip};
}

inline std::optional<EndToEndFields> to_fields(const std::optional<EndToEndOptions>& options) {
  if (!options) return std::nullopt;
  return EndToEndFields{options->learning_rate, options->every, options->clip};
}

}  // namespace fastweights::python
