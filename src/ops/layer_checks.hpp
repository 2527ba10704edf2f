#pragma once

#include <string_view>

#include <ATen/core/Tensor.h>

namespace fastweights::detail {

/// Throws ShapeError unless `tensor` has exactly the shape `expected`; `layout` names the
/// dimensions, for example "[B, T, D]". Shapes may be symbolic.
void check_shape(std::string_view op, std::string_view name, const at::Tensor& tensor,
                 std::string_view layout, c10::SymIntArrayRef expected);

/// Throws ShapeError unless `tensor` has as many dimensions as `layout` names.
void check_dim(std::string_view op, std::string_view name, const at::Tensor& tensor,
               std::string_view layout, int64_t dim);

/// Throws ShapeError unless `tensor` is of a floating-point type.
void check_floating(std::string_view op, std::string_view name, const at::Tensor& tensor);

/// Throws ShapeError with the op's name in front unless `condition` holds.
void check_that(bool condition, std::string_view op, std::string_view message);

}  // namespace fastweights::detail
