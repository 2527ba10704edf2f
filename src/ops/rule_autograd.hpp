#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DispatchKeySet.h>

#include <cstddef>

#include "rule_stack.hpp"

// The halves of a rule's operators that call the operator again, further down the dispatcher. They
// leave the stack as it is where they have nothing to add: most calls need no gradient.

namespace fastweights::detail {

/// A call of an operator of a rule: its arguments are the last `count` values of the stack.
struct StackCall {
  const c10::OperatorHandle& op;
  c10::DispatchKeySet keys;
  const Rule& rule;
  Stack& stack;
  std::size_t count;
};

/// The rule, differentiable once, in reverse mode.
void forward_autograd(const StackCall& call);
/// The recurrent form, which has no derivative: a backward pass through it is an error.
void recurrent_autograd(const StackCall& call);
/// The recurrent form tells autograd that its states have changed.
void recurrent_in_place(const StackCall& call);
/// The rule in the type of autocast.
void forward_autocast(const StackCall& call);

}  // namespace fastweights::detail
