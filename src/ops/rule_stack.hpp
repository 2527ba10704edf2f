#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <cstddef>
#include <optional>
#include <vector>

#include "rule_operator.hpp"

// One call of a rule as its halves see it, and how it lies on the dispatcher's stack.

namespace fastweights::detail {

using Stack = torch::jit::Stack;

/// The tensors of one call, without an allocation.
using CallTensors = c10::SmallVector<at::Tensor, 12>;

inline constexpr std::array kInitialStates = {"initial_state", "initial_momentum"};
inline constexpr std::array kFinalStates = {"final_state", "final_momentum"};
inline constexpr std::array kStates = {"state", "momentum"};  // of the recurrent form

/// How many states the rule has.
inline std::size_t state_count(const RuleSpec& spec) { return spec.momentum ? 2 : 1; }

/// A registered rule: its table, and what would else be looked up in each call.
struct Rule {
  const RuleSpec& spec;
  std::vector<std::size_t> members;  // for each input, where it lies: see member_index
  c10::OperatorHandle backward;
};

/// One call of a rule; a tensor that is absent is undefined.
struct Call {
  const Rule& rule;
  CallTensors inputs = {};
  std::optional<double> scale = std::nullopt;
  std::array<at::Tensor, 2> states = {};
  bool in_place = false;  // whether the states are worked on; else they are initial ones
  bool output_final_state = false;
  at::Tensor cu_seqlens = {};
  bool use_qk_l2norm = false;

  const RuleSpec& spec() const { return rule.spec; }
  const char* name() const { return rule.spec.name; }
  const at::Tensor& q() const { return inputs[0]; }
  const at::Tensor& v() const { return inputs[2]; }
};

/// A call and the gradients of its outputs: o, then the final states.
struct BackwardCall {
  Call call;
  CallTensors d_outputs;
};

/// The call that the last `count` values of the stack are the arguments of. The states of a
/// recurrent call are worked on in place.
Call forward_call(const Rule& rule, const Stack& stack, std::size_t count);
BackwardCall backward_call(const Rule& rule, const Stack& stack, std::size_t count);
Call recurrent_call(const Rule& rule, const Stack& stack, std::size_t count);

/// The arguments of the rule's backward operator.
Stack backward_stack(const Call& call, const CallTensors& d_outputs);

/// The value of a tensor that may be undefined.
inline at::IValue optional_value(const at::Tensor& tensor) {
  return tensor.defined() ? at::IValue(tensor) : at::IValue();
}
inline at::IValue optional_value(const std::optional<double>& number) {
  return number ? at::IValue(*number) : at::IValue();
}

}  // namespace fastweights::detail
