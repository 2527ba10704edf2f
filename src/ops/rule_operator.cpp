#include "rule_operator.hpp"

#include <ATen/autocast_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/torch.h>

#include <array>
#include <cmath>
#include <mutex>
#include <string_view>

#include "autograd_node.hpp"
#include "compute_type.hpp"
#include "fastweights/core/error.hpp"
#include "layer_op.hpp"
#include "rule_checks.hpp"

namespace fastweights::detail {
namespace {

using at::Tensor;
using torch::jit::Stack;

constexpr std::array kInitialStates = {"initial_state", "initial_momentum"};
constexpr std::array kFinalStates = {"final_state", "final_momentum"};
constexpr std::array kStates = {"state", "momentum"};  // of the recurrent form

/// One call of a rule; a tensor that is absent is undefined.
struct Call {
  const RuleSpec& spec;
  Tensors inputs = {};
  std::optional<double> scale = std::nullopt;
  Tensors states = {};  // initial ones, or those worked on
  std::array<const char*, 2> state_names = kInitialStates;
  bool output_final_state = false;
  Tensor cu_seqlens = {};
  bool use_qk_l2norm = false;

  const Tensor& q() const { return inputs[0]; }
  const Tensor& v() const { return inputs[2]; }
};

size_t state_count(const RuleSpec& spec) { return spec.momentum ? 2 : 1; }

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
  for (size_t i = 0; i < state_count(spec); ++i) {
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
  for (size_t i = 0; i < state_count(spec); ++i) {
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
  std::string inputs;
  for (const auto& input : spec.inputs) {
    inputs += fmt::format("Tensor{} {}, ", input.optional ? "?" : "", input.name);
  }
  return fmt::format(
      "{}_recurrent_({}Tensor(a!) state, {}float? scale=None, bool use_qk_l2norm=False) -> Tensor",
      spec.name, inputs, spec.momentum ? "Tensor(b!) momentum, " : "");
}

// ---- stacks ------------------------------------------------------------------------------------

/// Reads the arguments of a call off a stack, one after the other.
class Arguments {
 public:
  Arguments(const Stack& stack, size_t count) : stack_(stack), next_(stack.size() - count) {}

  Tensor tensor() {
    const auto& value = stack_[next_++];
    return value.isNone() ? Tensor() : value.toTensor();
  }
  Tensors tensors(size_t count) {
    Tensors result;
    for (size_t i = 0; i < count; ++i) result.push_back(tensor());
    return result;
  }
  std::optional<double> optional_double() { return stack_[next_++].toOptional<double>(); }
  bool boolean() { return stack_[next_++].toBool(); }

 private:
  const Stack& stack_;
  size_t next_;
};

at::IValue optional_value(const Tensor& tensor) {
  return tensor.defined() ? at::IValue(tensor) : at::IValue();
}

at::IValue optional_value(const std::optional<double>& number) {
  return number ? at::IValue(*number) : at::IValue();
}

void push(Stack& stack, const Tensors& tensors) {
  for (const auto& tensor : tensors) stack.push_back(optional_value(tensor));
}

Call forward_call(const RuleSpec& spec, const Stack& stack, size_t count) {
  Arguments arguments(stack, count);
  Call call{.spec = spec, .inputs = arguments.tensors(spec.inputs.size())};
  call.scale = arguments.optional_double();
  call.states = arguments.tensors(state_count(spec));
  call.output_final_state = arguments.boolean();
  call.cu_seqlens = arguments.tensor();
  call.use_qk_l2norm = arguments.boolean();
  return call;
}

Stack forward_stack(const Call& call) {
  Stack stack;
  push(stack, call.inputs);
  stack.push_back(optional_value(call.scale));
  push(stack, call.states);
  stack.emplace_back(call.output_final_state);
  stack.push_back(optional_value(call.cu_seqlens));
  stack.emplace_back(call.use_qk_l2norm);
  return stack;
}

/// A call and the gradients of its outputs: o, then the final states.
struct BackwardCall {
  Call call;
  Tensors d_outputs;
};

BackwardCall backward_call(const RuleSpec& spec, const Stack& stack, size_t count) {
  Arguments arguments(stack, count);
  auto d_outputs = arguments.tensors(1 + state_count(spec));
  Call call{.spec = spec, .inputs = arguments.tensors(spec.inputs.size())};
  call.scale = arguments.optional_double();
  call.states = arguments.tensors(state_count(spec));
  call.cu_seqlens = arguments.tensor();
  call.use_qk_l2norm = arguments.boolean();
  return {std::move(call), std::move(d_outputs)};
}

Stack backward_stack(const Call& call, const Tensors& d_outputs) {
  Stack stack;
  push(stack, d_outputs);
  push(stack, call.inputs);
  stack.push_back(optional_value(call.scale));
  push(stack, call.states);
  stack.push_back(optional_value(call.cu_seqlens));
  stack.emplace_back(call.use_qk_l2norm);
  return stack;
}

/// A recurrent call: its states, in `states`, are worked on in place.
Call recurrent_call(const RuleSpec& spec, const Stack& stack, size_t count) {
  Arguments arguments(stack, count);
  Call call{.spec = spec, .inputs = arguments.tensors(spec.inputs.size())};
  call.states = arguments.tensors(state_count(spec));
  call.state_names = kStates;
  call.scale = arguments.optional_double();
  call.output_final_state = true;
  call.use_qk_l2norm = arguments.boolean();
  return call;
}

void replace_arguments(Stack& stack, size_t count, const Tensors& results) {
  torch::jit::drop(stack, count);
  for (const auto& result : results) stack.emplace_back(result);
}

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fastweights::" + name).c_str(), "");
}

Tensors results_of(const Stack& stack) {
  Tensors results;
  for (const auto& value : stack) results.push_back(value.toTensor());
  return results;
}

// ---- checks ------------------------------------------------------------------------------------

struct ExpectedShape {
  const char* letters;
  std::vector<c10::SymInt> sizes;
};

ExpectedShape expected_shape(const Call& call, Layout layout) {
  const auto q = call.q().sym_sizes();
  const auto v = call.v().sym_sizes();
  switch (layout) {
    case Layout::kKeys: return {"[B, T, H, K]", q.vec()};
    case Layout::kValues: return {"[B, T, HV, V]", v.vec()};
    case Layout::kGates: return {"[B, T, HV]", {v[0], v[1], v[2]}};
    case Layout::kChannelGates: break;
  }
  return {"[B, T, HV, K]", {v[0], v[1], v[2], q[3]}};
}

void check_input(const Call& call, const RuleInput& input, const Tensor& tensor) {
  if (!tensor.defined()) return;
  const auto [letters, sizes] = expected_shape(call, input.layout);
  check_shape(call.spec.name, input.name, tensor, letters, sizes);
  const auto type = call.q().scalar_type();
  if (input.layout == Layout::kKeys || input.layout == Layout::kValues) {
    check_type(call.spec.name, input.name, tensor, {type});
  } else {
    check_type(call.spec.name, input.name, tensor, {type, at::kFloat});
  }
  check_device(call.spec.name, input.name, tensor, call.q());
}

void check_call_state(const Call& call, const char* name, const Tensor& state) {
  if (!state.defined()) return;
  check_state(call.spec.name, name, state, call.q(), call.v(), call.cu_seqlens);
}

/// Throws ShapeError unless shapes, types and devices fit; works on symbolic shapes.
void check(const Call& call) {
  check_query(call.spec.name, call.q());
  check_value(call.spec.name, call.q(), call.v());
  for (size_t i = 0; i < call.inputs.size(); ++i) {
    check_input(call, call.spec.inputs[i], call.inputs[i]);
  }
  if (call.cu_seqlens.defined()) check_packing(call.spec.name, call.q(), call.cu_seqlens);
  for (size_t i = 0; i < call.states.size(); ++i) {
    check_call_state(call, call.state_names[i], call.states[i]);
  }
}

/// The values of cu_seqlens, which lie on the CPU here.
void check_sequences(const Call& call) {
  if (!call.cu_seqlens.defined()) return;
  const auto ends = call.cu_seqlens.accessor<int64_t, 1>();
  const int64_t last = ends.size(0) - 1;
  if (ends[0] != 0 || ends[last] != call.q().size(1)) {
    refuse(call.spec.name,
           fmt::format("cu_seqlens must begin with 0 and end with T = {}, got {} and {}",
                       call.q().size(1), ends[0], ends[last]));
  }
  for (int64_t i = 1; i <= last; ++i) {
    if (ends[i] < ends[i - 1]) {
      refuse(call.spec.name,
             fmt::format("cu_seqlens must not decrease, got {} before {}", ends[i - 1], ends[i]));
    }
  }
}

// ---- from tensors to the kernels ---------------------------------------------------------------

/// Where a tensor of a rule lies among the kernels' parameters, and where its gradient does.
template <class Real>
struct Member {
  std::string_view name;
  core::ConstView core::RuleParams<Real>::* input;
  core::View core::RuleGradients<Real>::* gradient;
};

template <class Real>
const Member<Real>& member(std::string_view name) {
  using Params = core::RuleParams<Real>;
  using Gradients = core::RuleGradients<Real>;
  static constexpr std::array kMembers = {Member<Real>{"q", &Params::q, &Gradients::d_q},
                                          Member<Real>{"k", &Params::k, &Gradients::d_k},
                                          Member<Real>{"v", &Params::v, &Gradients::d_v},
                                          Member<Real>{"g", &Params::g, &Gradients::d_g},
                                          Member<Real>{"beta", &Params::beta, &Gradients::d_beta},
                                          Member<Real>{"a", &Params::a, &Gradients::d_a},
                                          Member<Real>{"b", &Params::b, &Gradients::d_b},
                                          Member<Real>{"p", &Params::p, &Gradients::d_p},
                                          Member<Real>{"mu", &Params::mu, &Gradients::d_mu},
                                          Member<Real>{"eta", &Params::eta, &Gradients::d_eta}};
  for (const auto& entry : kMembers) {
    if (entry.name == name) return entry;
  }
  throw std::logic_error("no rule input " + std::string(name));
}

/// Checks a call and gives its tensors the layout that the kernels read.
void prepare(Call& call) {
  check(call);
  for (auto& tensor : call.inputs) tensor = with_adjacent_rows(tensor);
  for (auto& state : call.states) {
    if (state.defined()) state = state.contiguous();
  }
  if (call.cu_seqlens.defined()) call.cu_seqlens = call.cu_seqlens.contiguous();
  check_sequences(call);
}

/// The kernels' parameters of a prepared call, which keeps the tensors alive.
template <class Real>
core::RuleParams<Real> params_of(const Call& call) {
  core::RuleParams<Real> p;
  const Tensor& q = call.q();
  const Tensor& v = call.v();
  p.shape = {q.size(0), q.size(1), q.size(2), v.size(2), q.size(3), v.size(3)};
  if (call.cu_seqlens.defined()) {
    p.cu_seqlens = {call.cu_seqlens.const_data_ptr<std::int64_t>(),
                    static_cast<std::size_t>(call.cu_seqlens.numel())};
  }
  p.scale = call.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.shape.K)));
  if (!std::isfinite(p.scale)) refuse(call.spec.name, "scale must be finite");
  p.use_qk_l2norm = call.use_qk_l2norm;
  for (size_t i = 0; i < call.inputs.size(); ++i) {
    const auto& input = call.spec.inputs[i];
    if (input.layout == Layout::kChannelGates) p.channel_gate = true;
    if (call.inputs[i].defined()) p.*member<Real>(input.name).input = const_view(call.inputs[i]);
  }
  const auto initial = [&](size_t i) {
    return i < call.states.size() && call.states[i].defined()
               ? call.states[i].template const_data_ptr<Real>()
               : nullptr;
  };
  p.initial_state = initial(0);
  p.initial_momentum = initial(1);
  return p;
}

template <class Real>
const core::RuleForms<Real>& forms_of(const RuleSpec& spec) {
  if constexpr (std::is_same_v<Real, double>) {
    return spec.forms_double();
  } else {
    return spec.forms();
  }
}

/// o, and the final states where they are wanted, else empty tensors.
Tensors empty_outputs(const Call& call) {
  Tensors outputs = {at::empty_symint(call.v().sym_sizes(), call.v().options())};
  const auto options = call.v().options().dtype(compute_type(call.v()));
  for (size_t i = 0; i < state_count(call.spec); ++i) {
    outputs.push_back(
        call.output_final_state
            ? at::empty_symint(state_shape(call.q(), call.v(), call.cu_seqlens), options)
            : at::empty({0}, options));
  }
  return outputs;
}

/// Gradients of the inputs and initial states; empty tensors for those that are absent.
Tensors empty_gradients(const Call& call) {
  Tensors gradients;
  for (const Tensors* group : {&call.inputs, &call.states}) {
    for (const auto& tensor : *group) {
      gradients.push_back(tensor.defined() ? at::empty_symint(tensor.sym_sizes(), tensor.options())
                                           : at::empty({0}, call.v().options()));
    }
  }
  return gradients;
}

Tensors forward_cpu(Call call) {
  prepare(call);
  const Tensors outputs = empty_outputs(call);
  with_real(call.v(), [&](auto real) {
    using Real = decltype(real);
    auto params = params_of<Real>(call);
    params.o = view(outputs[0]);
    if (call.output_final_state) {
      params.final_state = outputs[1].template mutable_data_ptr<Real>();
      if (call.spec.momentum) {
        params.final_momentum = outputs[2].template mutable_data_ptr<Real>();
      }
    }
    forms_of<Real>(call.spec).forward(params, parallel_executor());
  });
  return outputs;
}

Tensors backward_cpu(BackwardCall source) {
  Call& call = source.call;
  prepare(call);
  Tensors& d_outputs = source.d_outputs;
  d_outputs[0] = with_adjacent_rows(d_outputs[0]);
  if (d_outputs[0].defined()) {
    check_shape(call.spec.name, "d_o", d_outputs[0], "[B, T, HV, V]", call.v().sym_sizes().vec());
  }
  for (size_t i = 1; i < d_outputs.size(); ++i) {
    if (d_outputs[i].defined()) d_outputs[i] = d_outputs[i].contiguous();
    check_call_state(call, i == 1 ? "d_final_state" : "d_final_momentum", d_outputs[i]);
  }
  const Tensors gradients = empty_gradients(call);
  with_real(call.v(), [&](auto real) {
    using Real = decltype(real);
    const auto params = params_of<Real>(call);
    core::RuleGradients<Real> d;
    const auto given = [&](size_t i) {
      return i < d_outputs.size() && d_outputs[i].defined()
                 ? d_outputs[i].template const_data_ptr<Real>()
                 : nullptr;
    };
    if (d_outputs[0].defined()) d.d_o = const_view(d_outputs[0]);
    d.d_final_state = given(1);
    d.d_final_momentum = given(2);
    for (size_t i = 0; i < call.inputs.size(); ++i) {
      if (call.inputs[i].defined()) {
        d.*member<Real>(call.spec.inputs[i].name).gradient = view(gradients[i]);
      }
    }
    const auto wanted = [&](size_t i) {
      return i < call.states.size() && call.states[i].defined()
                 ? gradients[call.inputs.size() + i].template mutable_data_ptr<Real>()
                 : nullptr;
    };
    d.d_initial_state = wanted(0);
    d.d_initial_momentum = wanted(1);
    forms_of<Real>(call.spec).backward(params, d, parallel_executor());
  });
  return gradients;
}

Tensor recurrent_cpu(Call call) {
  const Tensors states = call.states;
  prepare(call);
  Tensor o = at::empty(call.v().sizes(), call.v().options());
  with_real(call.v(), [&](auto real) {
    using Real = decltype(real);
    auto params = params_of<Real>(call);
    params.o = view(o);
    params.final_state = call.states[0].template mutable_data_ptr<Real>();
    if (call.spec.momentum) {
      params.final_momentum = call.states[1].template mutable_data_ptr<Real>();
    }
    forms_of<Real>(call.spec).recurrent(params, parallel_executor());
  });
  for (size_t i = 0; i < states.size(); ++i) {
    if (!call.states[i].is_same(states[i])) states[i].copy_(call.states[i]);
  }
  return o;
}

// ---- autograd ----------------------------------------------------------------------------------

struct RuleOperatorNode : torch::autograd::Node {
  explicit RuleOperatorNode(const Call& call)
      : spec(call.spec),
        scale(call.scale),
        use_qk_l2norm(call.use_qk_l2norm),
        cu_seqlens(call.cu_seqlens, false) {
    for (const auto& tensor : call.inputs) inputs.emplace_back(tensor, false);
    for (const auto& tensor : call.states) states.emplace_back(tensor, false);
  }

  std::string name() const override { return fmt::format("Fastweights_{}_backward", spec.name); }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t count = inputs.size() + states.size();
    gradients.resize(1 + state_count(spec));
    bool any = false;
    for (const auto& gradient : gradients) any = any || gradient.defined();
    if (!any) return torch::autograd::variable_list(count);
    Call call{.spec = spec};
    for (const auto& saved : inputs) call.inputs.push_back(saved.unpack());
    for (const auto& saved : states) call.states.push_back(saved.unpack());
    call.scale = scale;
    call.cu_seqlens = cu_seqlens.unpack();
    call.use_qk_l2norm = use_qk_l2norm;
    Stack stack = backward_stack(call, gradients);
    find(std::string(spec.name) + "_backward").callBoxed(&stack);
    auto results = results_of(stack);
    for (size_t i = 0; i < count; ++i) {
      if (!should_compute_output(i)) results[i] = Tensor();
    }
    return results;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& saved : inputs) saved.reset_data();
    for (auto& saved : states) saved.reset_data();
    cu_seqlens.reset_data();
  }

  const RuleSpec& spec;
  std::optional<double> scale;
  bool use_qk_l2norm;
  std::vector<torch::autograd::SavedVariable> inputs, states;
  torch::autograd::SavedVariable cu_seqlens;
};

NodePointer make_node(const Call& call) {
  Tensors differentiable = call.inputs;
  differentiable.insert(differentiable.end(), call.states.begin(), call.states.end());
  refuse_forward_mode(call.spec.name, differentiable);
  bool needed = false;
  torch::autograd::edge_list edges;
  for (const auto& tensor : differentiable) {
    needed = needed || (tensor.defined() && tensor.requires_grad());
    edges.push_back(tensor.defined() ? torch::autograd::impl::gradient_edge(tensor)
                                     : torch::autograd::Edge());
  }
  if (!needed || !at::GradMode::is_enabled()) return nullptr;
  auto* node = new RuleOperatorNode(call);
  NodePointer owner = own_node(node);
  node->set_next_edges(std::move(edges));
  return owner;
}

Tensors forward_autograd(const c10::OperatorHandle& op, const Call& call) {
  const auto node = make_node(call);
  Stack stack = forward_stack(call);
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(&stack);
  }
  auto outputs = results_of(stack);
  if (node) {
    torch::autograd::set_history(outputs[0], node);
    for (size_t i = 1; call.output_final_state && i < outputs.size(); ++i) {
      torch::autograd::set_history(outputs[i], node);
    }
  }
  return outputs;
}

Tensors forward_autocast(const c10::OperatorHandle& op, Call call) {
  const auto device = call.q().device().type();
  const c10::impl::ExcludeDispatchKeyGuard guard(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto is_gate = [&](size_t i) {
    const auto layout = call.spec.inputs[i].layout;
    return layout == Layout::kGates || layout == Layout::kChannelGates;
  };
  for (size_t i = 0; i < call.inputs.size(); ++i) {
    Tensor& tensor = call.inputs[i];
    if (tensor.defined() && !is_gate(i)) tensor = at::autocast::cached_cast(type, tensor, device);
  }
  // Gates keep their type where the rule takes it; the other 16-bit type does not go with `type`.
  for (size_t i = 0; i < call.inputs.size(); ++i) {
    Tensor& tensor = call.inputs[i];
    if (tensor.defined() && is_gate(i) && tensor.scalar_type() != call.q().scalar_type()) {
      tensor = tensor.to(at::kFloat);
    }
  }
  Stack stack = forward_stack(call);
  op.callBoxed(&stack);
  return results_of(stack);
}

// ---- registration ------------------------------------------------------------------------------

/// A boxed kernel out of a function of the operator, the rule and the stack's arguments.
template <class Body>
struct BoxedRule : c10::OperatorKernel {
  BoxedRule(const RuleSpec& rule, Body function) : spec(rule), body(std::move(function)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const size_t count = op.schema().arguments().size();
    const Tensors results = body(op, spec, *stack, count);
    replace_arguments(*stack, count, results);
  }

  const RuleSpec& spec;
  Body body;
};

template <class Body>
void implement(torch::Library& library, const std::string& name, c10::DispatchKey key,
               const RuleSpec& spec, Body body) {
  library.impl(name.c_str(),
               torch::dispatch(key, torch::CppFunction::makeFromBoxedFunctor(
                                        std::make_unique<BoxedRule<Body>>(spec, std::move(body)))));
}

using Handle = c10::OperatorHandle;

void implement_forward(torch::Library& library, const RuleSpec& spec) {
  const std::string name = spec.name;
  implement(library, name, c10::DispatchKey::CPU, spec,
            [](const Handle&, const RuleSpec& rule, const Stack& stack, size_t count) {
              return forward_cpu(forward_call(rule, stack, count));
            });
  implement(library, name, c10::DispatchKey::Meta, spec,
            [](const Handle&, const RuleSpec& rule, const Stack& stack, size_t count) {
              const Call call = forward_call(rule, stack, count);
              check(call);
              return empty_outputs(call);
            });
  implement(library, name, c10::DispatchKey::Autograd, spec,
            [](const Handle& op, const RuleSpec& rule, const Stack& stack, size_t count) {
              return forward_autograd(op, forward_call(rule, stack, count));
            });
  for (const auto key : {c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA}) {
    implement(library, name, key, spec,
              [](const Handle& op, const RuleSpec& rule, const Stack& stack, size_t count) {
                return forward_autocast(op, forward_call(rule, stack, count));
              });
  }
}

void implement_backward(torch::Library& library, const RuleSpec& spec) {
  const std::string name = std::string(spec.name) + "_backward";
  implement(library, name, c10::DispatchKey::CPU, spec,
            [](const Handle&, const RuleSpec& rule, const Stack& stack, size_t count) {
              return backward_cpu(backward_call(rule, stack, count));
            });
  implement(library, name, c10::DispatchKey::Meta, spec,
            [](const Handle&, const RuleSpec& rule, const Stack& stack, size_t count) {
              return empty_gradients(backward_call(rule, stack, count).call);
            });
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Autograd,
                                             torch::autograd::autogradNotImplementedFallback()));
}

void implement_recurrent(torch::Library& library, const RuleSpec& spec) {
  const std::string name = std::string(spec.name) + "_recurrent_";
  implement(library, name, c10::DispatchKey::CPU, spec,
            [](const Handle&, const RuleSpec& rule, const Stack& stack, size_t count) {
              return Tensors{recurrent_cpu(recurrent_call(rule, stack, count))};
            });
  implement(library, name, c10::DispatchKey::Meta, spec,
            [](const Handle&, const RuleSpec& rule, const Stack& stack, size_t count) {
              const Call call = recurrent_call(rule, stack, count);
              check(call);
              return Tensors{empty_outputs(call)[0]};
            });
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Autograd,
                                             torch::autograd::autogradNotImplementedFallback()));
  library.impl(name.c_str(),
               torch::dispatch(c10::DispatchKey::ADInplaceOrView,
                               torch::autograd::autogradNotImplementedInplaceOrViewFallback()));
}

Tensors defined_or_not(const std::vector<std::optional<Tensor>>& tensors) {
  Tensors result;
  for (const auto& tensor : tensors) result.push_back(tensor.value_or(Tensor()));
  return result;
}

}  // namespace

void register_rule(torch::Library& library, const RuleSpec& spec) {
  library.def(forward_schema(spec).c_str());
  library.def(backward_schema(spec).c_str());
  library.def(recurrent_schema(spec).c_str());
  implement_forward(library, spec);
  implement_backward(library, spec);
  implement_recurrent(library, spec);
}

c10::OperatorHandle operator_of(const RuleSpec& spec) { return find(spec.name); }

c10::OperatorHandle recurrent_operator_of(const RuleSpec& spec) {
  return find(std::string(spec.name) + "_recurrent_");
}

Tensors call_rule(const c10::OperatorHandle& op, const RuleSpec& spec,
                  const std::vector<std::optional<Tensor>>& inputs,
                  const RuleArguments& arguments) {
  Call call{.spec = spec, .inputs = defined_or_not(inputs)};
  call.scale = arguments.scale;
  call.states = defined_or_not(arguments.initial_states);
  call.states.resize(state_count(spec));
  call.output_final_state = arguments.output_final_state;
  call.cu_seqlens = arguments.cu_seqlens.value_or(Tensor());
  call.use_qk_l2norm = arguments.use_qk_l2norm;
  Stack stack = forward_stack(call);
  op.callBoxed(&stack);
  return results_of(stack);
}

RuleResult call_rule(const c10::OperatorHandle& op, const RuleSpec& spec,
                     const std::vector<std::optional<Tensor>>& inputs, const RuleOptions& options) {
  const auto outputs = call_rule(op, spec, inputs,
                                 RuleArguments{options.scale,
                                               {options.initial_state},
                                               options.output_final_state,
                                               options.cu_seqlens,
                                               options.use_qk_l2norm});
  return {outputs[0], options.output_final_state ? std::optional(outputs[1]) : std::nullopt};
}

Tensor call_rule_recurrent(const c10::OperatorHandle& op,
                           const std::vector<std::optional<Tensor>>& inputs, const Tensors& states,
                           std::optional<double> scale, bool use_qk_l2norm) {
  Stack stack;
  push(stack, defined_or_not(inputs));
  push(stack, states);
  stack.push_back(optional_value(scale));
  stack.emplace_back(use_qk_l2norm);
  op.callBoxed(&stack);
  return stack[0].toTensor();
}

}  // namespace fastweights::detail
