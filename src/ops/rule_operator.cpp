#include "rule_operator.hpp"

#include <fmt/format.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "rule_autograd.hpp"
#include "rule_kernels.hpp"
#include "rule_stack.hpp"

namespace fastweights::detail {
namespace {

using at::Tensor;

// ---- schemas -----------------------------------------------------------------------------------

std::string inputs_schema(const RuleSpec& spec, bool defaults) {
  std::string text;
  for (const auto& input : spec.inputs) {
    text += fmt::format("Tensor{} {}{}, ", input.optional ? "?" : "", input.name,
                        input.optional && defaults ? "=None" : "");
  }
  return text;
}

std::string forward_schema(const RuleSpec& spec) {
  // Optional inputs come last, so that they can default.
  std::string states, results;
  for (std::size_t i = 0; i < state_count(spec); ++i) {
    states += fmt::format("Tensor? {}=None, ", kInitialStates[i]);
    results += fmt::format(", Tensor {}", kFinalStates[i]);
  }
  return fmt::format(
      "{}({}float? scale=None, {}bool output_final_state=False, Tensor? cu_seqlens=None, bool "
      "use_qk_l2norm=False) -> (Tensor o{})",
      spec.name, inputs_schema(spec, true), states, results);
}

std::string backward_schema(const RuleSpec& spec) {
  std::string gradients, states, results;
  for (std::size_t i = 0; i < state_count(spec); ++i) {
    gradients += fmt::format("Tensor? d_{}, ", kFinalStates[i]);
    states += fmt::format("Tensor? {}, ", kInitialStates[i]);
    results += fmt::format(", Tensor d_{}", kInitialStates[i]);
  }
  std::string inputs;
  for (const auto& input : spec.inputs) inputs += fmt::format(", Tensor d_{}", input.name);
  return fmt::format(
      "{}_backward(Tensor? d_o, {}{}float? scale, {}Tensor? cu_seqlens, bool use_qk_l2norm) -> "
      "({}{})",
      spec.name, gradients, inputs_schema(spec, false), states, inputs.substr(2), results);
}

std::string recurrent_schema(const RuleSpec& spec) {
  return fmt::format(
      "{}_recurrent_({}Tensor(a!) state, {}float? scale=None, bool use_qk_l2norm=False) -> Tensor",
      spec.name, inputs_schema(spec, false), spec.momentum ? "Tensor(b!) momentum, " : "");
}

// ---- registration ------------------------------------------------------------------------------

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fastweights::" + name).c_str(), "");
}

std::shared_ptr<const Rule> make_rule(const RuleSpec& spec) {
  std::vector<std::size_t> members;
  for (const auto& input : spec.inputs) members.push_back(member_index(input.name));
  return std::make_shared<const Rule>(
      Rule{spec, std::move(members), find(std::string(spec.name) + "_backward")});
}

/// A boxed kernel out of a function of the call. Its results replace the arguments, unless it
/// returns none: then it has done so itself.
template <class Body>
struct BoxedRule : c10::OperatorKernel {
  BoxedRule(std::shared_ptr<const Rule> source, Body function)
      : rule(std::move(source)), body(std::move(function)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const StackCall call{op, keys, *rule, *stack, op.schema().arguments().size()};
    if constexpr (std::is_void_v<decltype(body(call))>) {
      body(call);
    } else {
      replace_arguments(call, body(call));
    }
  }

  static void replace_arguments(const StackCall& call, CallTensors results) {
    torch::jit::drop(call.stack, call.count);
    for (auto& result : results) call.stack.emplace_back(std::move(result));
  }

  std::shared_ptr<const Rule> rule;
  Body body;
};

/// Implements one operator of a rule.
class Implementer {
 public:
  Implementer(torch::Library& library, std::shared_ptr<const Rule> rule, const char* suffix)
      : library_(library), rule_(std::move(rule)), name_(rule_->spec.name + std::string(suffix)) {}

  template <class Body>
  void operator()(c10::DispatchKey key, Body body) {
    library_.impl(name_.c_str(),
                  torch::dispatch(key, torch::CppFunction::makeFromBoxedFunctor(
                                           std::make_unique<BoxedRule<Body>>(rule_, body))));
  }
  void operator()(c10::DispatchKey key, torch::CppFunction&& function) {
    library_.impl(name_.c_str(), torch::dispatch(key, std::move(function)));
  }

 private:
  torch::Library& library_;
  std::shared_ptr<const Rule> rule_;
  std::string name_;
};

void implement_forward(Implementer implement) {
  implement(c10::DispatchKey::CPU, [](const StackCall& call) {
    return forward_cpu(forward_call(call.rule, call.stack, call.count));
  });
  implement(c10::DispatchKey::Meta, [](const StackCall& call) {
    return forward_meta(forward_call(call.rule, call.stack, call.count));
  });
  implement(c10::DispatchKey::Autograd, &forward_autograd);
  implement(c10::DispatchKey::AutocastCPU, &forward_autocast);
  implement(c10::DispatchKey::AutocastCUDA, &forward_autocast);
}

void implement_backward(Implementer implement) {
  implement(c10::DispatchKey::CPU, [](const StackCall& call) {
    return backward_cpu(backward_call(call.rule, call.stack, call.count));
  });
  implement(c10::DispatchKey::Meta, [](const StackCall& call) {
    return backward_meta(backward_call(call.rule, call.stack, call.count).call);
  });
  implement(c10::DispatchKey::Autograd, torch::autograd::autogradNotImplementedFallback());
}

void implement_recurrent(Implementer implement) {
  implement(c10::DispatchKey::CPU, [](const StackCall& call) {
    return CallTensors{recurrent_cpu(recurrent_call(call.rule, call.stack, call.count))};
  });
  implement(c10::DispatchKey::Meta, [](const StackCall& call) {
    return CallTensors{recurrent_meta(recurrent_call(call.rule, call.stack, call.count))};
  });
  implement(c10::DispatchKey::Autograd, &recurrent_autograd);
  implement(c10::DispatchKey::ADInplaceOrView, &recurrent_in_place);
}

// ---- calls -------------------------------------------------------------------------------------

at::IValue value_of(const RuleArgument& argument) {
  return argument.tensor != nullptr ? at::IValue(*argument.tensor) : at::IValue();
}

/// A stack with room for a call's tensors and settings.
Stack stack_of(RuleTensors inputs) {
  Stack stack;
  stack.reserve(inputs.size() + 6);
  for (const auto& input : inputs) stack.push_back(value_of(input));
  return stack;
}

Stack call_forward(const c10::OperatorHandle& op, RuleTensors inputs, RuleTensors initial_states,
                   const RuleSettings& settings) {
  Stack stack = stack_of(inputs);
  stack.push_back(optional_value(settings.scale));
  for (const auto& state : initial_states) stack.push_back(value_of(state));
  stack.emplace_back(settings.output_final_state);
  stack.push_back(value_of(settings.cu_seqlens));
  stack.emplace_back(settings.use_qk_l2norm);
  op.callBoxed(&stack);
  return stack;
}

}  // namespace

void register_rule(torch::Library& library, const RuleSpec& spec) {
  library.def(forward_schema(spec).c_str());
  library.def(backward_schema(spec).c_str());
  library.def(recurrent_schema(spec).c_str());
  const auto rule = make_rule(spec);
  implement_forward({library, rule, ""});
  implement_backward({library, rule, "_backward"});
  implement_recurrent({library, rule, "_recurrent_"});
}

c10::OperatorHandle operator_of(const RuleSpec& spec) { return find(spec.name); }

c10::OperatorHandle recurrent_operator_of(const RuleSpec& spec) {
  return find(std::string(spec.name) + "_recurrent_");
}

std::vector<Tensor> call_rule(const c10::OperatorHandle& op, RuleTensors inputs,
                              RuleTensors initial_states, const RuleSettings& settings) {
  Stack stack = call_forward(op, inputs, initial_states, settings);
  std::vector<Tensor> results;
  for (auto& value : stack) results.push_back(std::move(value).toTensor());
  return results;
}

RuleResult call_rule(const c10::OperatorHandle& op, RuleTensors inputs,
                     const RuleOptions& options) {
  Stack stack = call_forward(
      op, inputs, {options.initial_state},
      {options.scale, options.output_final_state, options.cu_seqlens, options.use_qk_l2norm});
  RuleResult result{std::move(stack[0]).toTensor(), std::nullopt};
  if (options.output_final_state) result.final_state = std::move(stack[1]).toTensor();
  return result;
}

Tensor call_rule_recurrent(const c10::OperatorHandle& op, RuleTensors inputs, RuleTensors states,
                           std::optional<double> scale, bool use_qk_l2norm) {
  Stack stack = stack_of(inputs);
  for (const auto& state : states) stack.push_back(value_of(state));
  stack.push_back(optional_value(scale));
  stack.emplace_back(use_qk_l2norm);
  op.callBoxed(&stack);
  return std::move(stack[0]).toTensor();
}

}  // namespace fastweights::detail
