#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "fastweights/session/exact_store.hpp"

namespace fastweights::python {

/// The fields of Python's ExactStoreOptions, in its order: text_bytes, neighbour_bytes, shortest,
/// longest, candidates, neighbours, temperature, recency, rate, seed.
using StoreFields = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                               std::int64_t, double, double, double, std::uint64_t>;

inline ExactStoreOptions to_store_options(const StoreFields& fields) {
  const auto& [text_bytes, neighbour_bytes, shortest, longest, candidates, neighbours, temperature,
               recency, rate, seed] = fields;
  return {.match = {shortest, longest, candidates, text_bytes},
          .neighbours = {neighbours, seed, neighbour_bytes},
          .temperature = temperature,
          .recency = recency,
          .rate = rate};
}

inline std::optional<ExactStoreOptions> to_store_options(const std::optional<StoreFields>& fields) {
  return fields ? std::optional(to_store_options(*fields)) : std::nullopt;
}

inline std::optional<StoreFields> to_fields(const std::optional<ExactStoreOptions>& options) {
  if (!options) return std::nullopt;
  const auto& [match, neighbours, temperature, recency, rate] = *options;
  return StoreFields{
      match.bytes,      neighbours.bytes, match.shortest, match.longest, match.candidates,
      neighbours.count, temperature,      recency,        rate,          neighbours.seed};
}

}  // namespace fastweights::python
