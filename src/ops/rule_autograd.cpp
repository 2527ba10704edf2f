#include "rule_autograd.hpp"

#include <ATen/autocast_mode.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/torch.h>

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "autograd_node.hpp"

namespace fastweights::detail {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;

c10::ArrayRef<at::IValue> arguments_of(const StackCall& call) {
  return torch::jit::last(call.stack, call.count);
}

/// Calls `body` with every tensor among the arguments.
template <class Body>
void for_each_tensor(const StackCall& call, const Body& body) {
  for (const auto& value : arguments_of(call)) {
    if (value.isTensor() && value.toTensor().defined()) body(value.toTensor());
  }
}

bool needs_gradient(const StackCall& call) {
  if (!at::GradMode::is_enabled()) return false;
  bool any = false;
  for_each_tensor(call, [&](const Tensor& tensor) { any = any || tensor.requires_grad(); });
  return any;
}

/// Calls the operator below autograd, on the stack as it is.
void call_below(const StackCall& call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  call.op.redispatchBoxed(call.keys & c10::after_ADInplaceOrView_keyset, &call.stack);
}

torch::autograd::edge_list edges_of(const Call& call) {
  torch::autograd::edge_list edges;
  const auto add = [&](const Tensor& tensor) {
    edges.push_back(tensor.defined() ? torch::autograd::impl::gradient_edge(tensor)
                                     : torch::autograd::Edge());
  };
  for (const auto& input : call.inputs) add(input);
  for (std::size_t i = 0; i < state_count(call.spec()); ++i) add(call.states[i]);
  return edges;
}

struct RuleNode : torch::autograd::Node {
  explicit RuleNode(const Call& call)
      : rule(call.rule),
        scale(call.scale),
        use_qk_l2norm(call.use_qk_l2norm),
        cu_seqlens(call.cu_seqlens, false) {
    for (const auto& tensor : call.inputs) inputs.emplace_back(tensor, false);
    for (const auto& tensor : call.states) states.emplace_back(tensor, false);
  }

  std::string name() const override {
    return fmt::format("Fastweights_{}_backward", rule.spec.name);
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t count = inputs.size() + state_count(rule.spec);
    bool any = false;
    for (const auto& gradient : gradients) any = any || gradient.defined();
    if (!any) return torch::autograd::variable_list(count);
    CallTensors d_outputs(gradients.begin(), gradients.end());
    d_outputs.resize(1 + state_count(rule.spec));
    Stack stack = backward_stack(unpack(), d_outputs);
    rule.backward.callBoxed(&stack);
    torch::autograd::variable_list results(count);
    for (std::size_t i = 0; i < count; ++i) {
      if (should_compute_output(i)) results[i] = std::move(stack[i]).toTensor();
    }
    return results;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& saved : inputs) saved.reset_data();
    for (auto& saved : states) saved.reset_data();
    cu_seqlens.reset_data();
  }

  Call unpack() const {
    Call call{.rule = rule};
    for (const auto& saved : inputs) call.inputs.push_back(saved.unpack());
    for (std::size_t i = 0; i < states.size(); ++i) call.states[i] = states[i].unpack();
    call.scale = scale;
    call.cu_seqlens = cu_seqlens.unpack();
    call.use_qk_l2norm = use_qk_l2norm;
    return call;
  }

  const Rule& rule;
  std::optional<double> scale;
  bool use_qk_l2norm;
  std::vector<SavedVariable> inputs, states;
  SavedVariable cu_seqlens;
};

NodePointer make_node(const Call& call) {
  auto* node = new RuleNode(call);
  NodePointer owner = own_node(node);
  node->set_next_edges(edges_of(call));
  return owner;
}

/// The states of a recurrent call.
CallTensors states_of(const StackCall& call) {
  const auto states = arguments_of(call).slice(call.rule.spec.inputs.size());
  CallTensors tensors;
  for (std::size_t i = 0; i < state_count(call.rule.spec); ++i) {
    if (states[i].isTensor() && states[i].toTensor().defined()) {
      tensors.push_back(states[i].toTensor());
    }
  }
  return tensors;
}

/// A node whose backward pass is an error.
NodePointer make_refusing_node(const StackCall& call) {
  const std::string name = call.op.schema().name();
  auto* node = new torch::autograd::NotImplemented(name);
  NodePointer owner = own_node(node);
  torch::autograd::edge_list edges;
  for_each_tensor(call, [&](const Tensor& tensor) {
    if (tensor.requires_grad()) edges.push_back(torch::autograd::impl::gradient_edge(tensor));
  });
  node->set_next_edges(std::move(edges));
  return owner;
}

void redispatch_recurrent(const StackCall& call) {
  const at::AutoDispatchBelowAutograd guard;
  call.op.redispatchBoxed(call.keys & c10::after_autograd_keyset, &call.stack);
}

bool is_gate(const RuleInput& input) {
  return input.layout == Layout::kGates || input.layout == Layout::kChannelGates;
}

}  // namespace

void forward_autograd(const StackCall& call) {
  for_each_tensor(call,
                  [&](const Tensor& tensor) { refuse_forward_mode(call.rule.spec.name, tensor); });
  if (!needs_gradient(call)) return call_below(call);
  const Call source = forward_call(call.rule, call.stack, call.count);
  const auto node = make_node(source);
  call_below(call);
  const std::size_t outputs = 1 + (source.output_final_state ? state_count(source.spec()) : 0);
  const auto results = torch::jit::last(call.stack, 1 + state_count(source.spec()));
  for (std::size_t i = 0; i < outputs; ++i) {
    torch::autograd::set_history(results[i].toTensor(), node);
  }
}

void recurrent_autograd(const StackCall& call) {
  for_each_tensor(call, [&](const Tensor& tensor) {
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(0).defined(), "Trying to use forward AD with ",
                                call.op.schema().name(), " that does not support it.");
  });
  if (!needs_gradient(call)) return redispatch_recurrent(call);
  const auto states = states_of(call);
  for (const auto& state : states) torch::autograd::check_inplace(state, true);
  const auto node = make_refusing_node(call);
  redispatch_recurrent(call);
  torch::autograd::set_history(call.stack.back().toTensor(), node);
  for (const auto& state : states) {
    if (!state.requires_grad()) continue;
    const auto index = node->add_input_metadata(state);
    torch::autograd::impl::rebase_history(state, {node, index});
  }
}

void recurrent_in_place(const StackCall& call) {
  const auto states = states_of(call);
  call_below(call);
  for (const auto& state : states) {
    if (!state.is_inference()) torch::autograd::increment_version(state);
  }
}

void forward_autocast(const StackCall& call) {
  const auto& inputs = call.rule.spec.inputs;
  const auto arguments = call.stack.end() - static_cast<std::ptrdiff_t>(call.count);
  const auto device = arguments[0].toTensor().device().type();
  const c10::impl::ExcludeDispatchKeyGuard guard(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto replace = [&](bool gates, const auto& cast) {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      auto& value = arguments[static_cast<std::ptrdiff_t>(i)];
      if (is_gate(inputs[i]) == gates && value.isTensor()) value = cast(value.toTensor());
    }
  };
  replace(false, [&](const Tensor& x) { return at::autocast::cached_cast(type, x, device); });
  // Gates keep their type where the rule takes it; the other 16-bit type does not go with `type`.
  const auto features = arguments[0].toTensor().scalar_type();
  replace(true,
          [&](const Tensor& x) { return x.scalar_type() == features ? x : x.to(at::kFloat); });
  call.op.callBoxed(&call.stack);
}

}  // namespace fastweights::detail
