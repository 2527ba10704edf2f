#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "end_to_end_fields.hpp"
#include "fastweights/session/session.hpp"
#include "policy_fields.hpp"
#include "protection_fields.hpp"
#include "store_fields.hpp"

namespace fastweights::python {

/// The options of Python's Session, in its order: piece, seed, journal_bytes, store, policy,
/// end_to_end, protection.
using SessionFields =
    std::tuple<std::int64_t, std::uint64_t, std::int64_t, std::optional<StoreFields>, PolicyFields,
               std::optional<EndToEndFields>, std::optional<ProtectionFields>>;

inline SessionOptions to_session_options(const SessionFields& fields) {
  const auto& [piece, seed, journal_bytes, store, policy, end_to_end, protection] = fields;
  return {.piece = piece,
          .seed = seed,
          .journal_bytes = journal_bytes,
          .store = to_store_options(store),
          .policy = to_policy(policy),
          .end_to_end = to_end_to_end(end_to_end),
          .protection = to_protection(protection)};
}

}  // namespace fastweights::python
