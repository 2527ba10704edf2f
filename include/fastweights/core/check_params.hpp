#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "fastweights/core/error.hpp"
#include "fastweights/core/rule.hpp"

namespace fastweights::core {

namespace detail {

[[noreturn]] inline void refuse(const char* rule, const std::string& message) {
  throw ShapeError(std::string(rule) + ": " + message);
}

inline void check_shape(const char* rule, const Shape& shape) {
  const auto refuse_size = [&](const char* name, std::int64_t size, const char* wanted) {
    refuse(rule, std::string(name) + " must be " + wanted + ", got " + std::to_string(size));
  };
  if (shape.B < 0) refuse_size("B", shape.B, "at least 0");
  if (shape.T < 0) refuse_size("T", shape.T, "at least 0");
  if (shape.H < 1) refuse_size("H", shape.H, "at least 1");
  if (shape.HV < 1 || shape.HV % shape.H != 0) {
    refuse_size("HV", shape.HV, ("a positive multiple of H = " + std::to_string(shape.H)).c_str());
  }
  if (shape.K < 1 || shape.K > kMaxHeadSize) refuse_size("K", shape.K, "from 1 to 256");
  if (shape.V < 1 || shape.V > kMaxHeadSize) refuse_size("V", shape.V, "from 1 to 256");
}

inline void check_cu_seqlens(const char* rule, std::span<const std::int64_t> cu_seqlens,
                             const Shape& shape) {
  if (cu_seqlens.empty()) return;
  if (shape.B != 1) {
    refuse(rule, "packed input (cu_seqlens) needs B = 1, got B = " + std::to_string(shape.B));
  }
  if (cu_seqlens.front() != 0 || cu_seqlens.back() != shape.T) {
    refuse(rule, "cu_seqlens must begin with 0 and end with T = " + std::to_string(shape.T) +
                     ", got " + std::to_string(cu_seqlens.front()) + " and " +
                     std::to_string(cu_seqlens.back()));
  }
  for (std::size_t i = 1; i < cu_seqlens.size(); ++i) {
    if (cu_seqlens[i] < cu_seqlens[i - 1]) {
      refuse(rule, "cu_seqlens must not decrease, got " + std::to_string(cu_seqlens[i - 1]) +
                       " before " + std::to_string(cu_seqlens[i]));
    }
  }
}

}  // namespace detail

/// Throws ShapeError unless the sizes and `cu_seqlens` describe a valid call of `rule`.
template <class Real>
void check_params(const char* rule, const RuleParams<Real>& params) {
  detail::check_shape(rule, params.shape);
  detail::check_cu_seqlens(rule, params.cu_seqlens, params.shape);
  if (!std::isfinite(params.scale)) detail::refuse(rule, "scale must be finite");
}

/// The same for the rule with a gate, whose g must be there.
template <class Real>
void check_gated_params(const RuleParams<Real>& params) {
  check_params("gated_delta_rule", params);
  const bool empty = params.shape.B == 0 || params.shape.T == 0;  // nothing has no address
  if (!params.g && !empty) detail::refuse("gated_delta_rule", "g is missing");
}

}  // namespace fastweights::core
