#include "rule_stack.hpp"

#include <utility>

namespace fastweights::detail {
namespace {

using at::Tensor;

/// Reads the arguments of a call off a stack, one after the other.
class Arguments {
 public:
  Arguments(const Stack& stack, std::size_t count) : next_(stack.end() - std::ptrdiff_t(count)) {}

  Tensor tensor() {
    const auto& value = *next_++;
    return value.isNone() ? Tensor() : value.toTensor();
  }
  CallTensors tensors(std::size_t count) {
    CallTensors result;
    for (std::size_t i = 0; i < count; ++i) result.push_back(tensor());
    return result;
  }
  std::array<Tensor, 2> states(const RuleSpec& spec) {
    std::array<Tensor, 2> result;
    for (std::size_t i = 0; i < state_count(spec); ++i) result[i] = tensor();
    return result;
  }
  std::optional<double> optional_double() { return (next_++)->toOptional<double>(); }
  bool boolean() { return (next_++)->toBool(); }

 private:
  Stack::const_iterator next_;
};

}  // namespace

Call forward_call(const Rule& rule, const Stack& stack, std::size_t count) {
  Arguments arguments(stack, count);
  Call call{.rule = rule, .inputs = arguments.tensors(rule.spec.inputs.size())};
  call.scale = arguments.optional_double();
  call.states = arguments.states(rule.spec);
  call.output_final_state = arguments.boolean();
  call.cu_seqlens = arguments.tensor();
  call.use_qk_l2norm = arguments.boolean();
  return call;
}

BackwardCall backward_call(const Rule& rule, const Stack& stack, std::size_t count) {
  Arguments arguments(stack, count);
  auto d_outputs = arguments.tensors(1 + state_count(rule.spec));
  Call call{.rule = rule, .inputs = arguments.tensors(rule.spec.inputs.size())};
  call.scale = arguments.optional_double();
  call.states = arguments.states(rule.spec);
  call.cu_seqlens = arguments.tensor();
  call.use_qk_l2norm = arguments.boolean();
  return {std::move(call), std::move(d_outputs)};
}

Stack backward_stack(const Call& call, const CallTensors& d_outputs) {
  Stack stack;
  for (const auto& gradient : d_outputs) stack.push_back(optional_value(gradient));
  for (const auto& input : call.inputs) stack.push_back(optional_value(input));
  stack.push_back(optional_value(call.scale));
  for (std::size_t i = 0; i < state_count(call.spec()); ++i) {
    stack.push_back(optional_value(call.states[i]));
  }
  stack.push_back(optional_value(call.cu_seqlens));
  stack.emplace_back(call.use_qk_l2norm);
  return stack;
}

Call recurrent_call(const Rule& rule, const Stack& stack, std::size_t count) {
  Arguments arguments(stack, count);
  Call call{.rule = rule, .inputs = arguments.tensors(rule.spec.inputs.size())};
  call.states = arguments.states(rule.spec);
  call.in_place = true;
  call.scale = arguments.optional_double();
  call.output_final_state = true;
  call.use_qk_l2norm = arguments.boolean();
  return call;
}

}  // namespace fastweights::detail
