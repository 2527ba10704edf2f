#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "fastweights/session/protection.hpp"

namespace fastweights::python {

/// The fields of Python's Protection: projectors, least_free.
using ProtectionFields = std::tuple<std::vector<at::Tensor>, double>;

inline std::shared_ptr<const Protection> to_protection(
    const std::optional<ProtectionFields>& fields) {
  if (!fields) return nullptr;
  const auto& [projectors, least_free] = *fields;
  auto protection = std::make_shared<Protection>();
  for (const at::Tensor& each : projectors) protection->projectors.push_back(each.detach().clone());
  protection->least_free = least_free;
  return protection;
}

inline ProtectionFields to_fields(const Protection& protection) {
  return {protection.projectors, protection.least_free};
}

inline std::optional<ProtectionFields> to_fields(
    const std::shared_ptr<const Protection>& protection) {
  return protection ? std::optional(to_fields(*protection)) : std::nullopt;
}

}  // namespace fastweights::python
