#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <initializer_list>
#include <string>

#include "fastweights/core/view.hpp"

// What every rule's operator checks of its tensors, and how it hands them to the kernels. Each
// check throws ShapeError with the rule's name before the message; all work on symbolic shapes.

namespace fastweights::detail {

/// "[2, ?, 8]"
std::string shape_text(c10::SymIntArrayRef sizes);

[[noreturn]] void refuse(const char* rule, const std::string& message);

void check_shape(const char* rule, const char* name, const at::Tensor& tensor, const char* letters,
                 c10::SymIntArrayRef expected);
void check_type(const char* rule, const char* name, const at::Tensor& tensor,
                std::initializer_list<at::ScalarType> allowed);
void check_device(const char* rule, const char* name, const at::Tensor& tensor,
                  const at::Tensor& q);

/// q is [B, T, H, K] of a floating-point type.
void check_query(const char* rule, const at::Tensor& q);
/// v is [B, T, HV, V] with q's B and T, HV a multiple of H; K and V lie within the kernels' bounds.
void check_value(const char* rule, const at::Tensor& q, const at::Tensor& v);
/// cu_seqlens is int64 [N + 1], and q packed.
void check_packing(const char* rule, const at::Tensor& q, const at::Tensor& cu_seqlens);

/// [B, HV, K, V], or [N, HV, K, V] where cu_seqlens is defined.
std::array<c10::SymInt, 4> state_shape(const at::Tensor& q, const at::Tensor& v,
                                       const at::Tensor& cu_seqlens);
/// Of the type of the arithmetic; where that is fp32 it may be bf16 too.
void check_state(const char* rule, const char* name, const at::Tensor& state, const at::Tensor& q,
                 const at::Tensor& v, const at::Tensor& cu_seqlens);

/// Makes the tensor one whose elements of a row are adjacent: a copy, where they are not.
void make_rows_adjacent(at::Tensor& tensor);
void make_contiguous(at::Tensor& tensor);

core::ConstView const_view(const at::Tensor& tensor);
core::View view(const at::Tensor& tensor);

/// Calls `body` with a float or a double, the type of the arithmetic.
template <class Body>
void with_real(const at::Tensor& v, const Body& body) {
  if (v.scalar_type() == at::kDouble) {
    body(double{});
  } else {
    body(float{});
  }
}

}  // namespace fastweights::detail
