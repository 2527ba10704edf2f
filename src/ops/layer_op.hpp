#pragma once

#include <functional>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "fastweights/core/array.hpp"
#include "fastweights/core/executor.hpp"

// What the operators of the layers share: from tensors to kernels, and the autograd node.

namespace fastweights::detail {

/// An uninitialised contiguous tensor of the same shape, device and, unless given, type.
at::Tensor empty_as(const at::Tensor& tensor, std::optional<at::ScalarType> dtype = std::nullopt);

/// The kernels' name for a tensor's type.
/// @throws ShapeError if it is no floating-point type that they know
core::DType dtype_of(const at::Tensor& tensor);

/// The kernels' view of a contiguous tensor; null if it is undefined.
core::ConstArray const_array(const at::Tensor& tensor);
core::Array array(const at::Tensor& tensor);

/// Runs tasks on ATen's threads.
core::Executor parallel_executor();

/// A dispatcher entry, for calls that must pass through the dispatcher.
template <class Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Tensors = std::vector<at::Tensor>;

/// The backward half of an operator: from the gradient of its first output, its inputs and what its
/// forward half kept to the gradients of the inputs (undefined where there is none).
using Backward =
    std::function<Tensors(const at::Tensor& d_output, const Tensors& inputs, const Tensors& kept)>;

/// Calls `forward` below autograd and returns its outputs. If an input needs a gradient, the first
/// one gets a history of which `backward` is the derivative; those after it are kept for `backward`
/// and are not differentiable.
/// @throws c10::NotImplementedError if an input carries a forward-mode derivative, which there is
/// no formula for
Tensors record(const char* name, const Tensors& inputs, const std::function<Tensors()>& forward,
               Backward backward);

}  // namespace fastweights::detail
