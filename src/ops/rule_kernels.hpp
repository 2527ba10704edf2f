#pragma once

#include <cstddef>

#include "rule_stack.hpp"

// From tensors to the kernels and back: the checks of a call, and its CPU and shape halves.

namespace fastweights::detail {

/// Where the input `name` lies among the kernels' parameters.
/// \throws std::logic_error if the kernels know no such input
std::size_t member_index(const char* name);

/// o, then the final states: empty tensors unless asked for.
CallTensors forward_cpu(Call call);
CallTensors forward_meta(const Call& call);

/// Gradients of the inputs, then of the initial states: empty tensors for those that are absent.
CallTensors backward_cpu(BackwardCall source);
CallTensors backward_meta(const Call& call);

/// o; the states are worked on in place.
at::Tensor recurrent_cpu(Call call);
at::Tensor recurrent_meta(const Call& call);

}  // namespace fastweights::detail
