#include "fastweights/ops/softmax_delta_rule.hpp"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "autograd_node.hpp"
#include "compute_type.hpp"
#include "fastweights/core/softmax_delta_rule.hpp"
#include "layer_op.hpp"
#include "rule_checks.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "softmax_delta_rule";

// ---- checks ------------------------------------------------------------------------------------

/// The tensors of a call; those left out are undefined.
struct Call {
  Tensor h, logits, target, eta, g, initial_state;
  bool pending = false;

  std::vector<c10::SymInt> tokens() const { return {h.sym_size(0), h.sym_size(1)}; }
  std::vector<c10::SymInt> state_shape() const {
    return {h.sym_size(0), h.sym_size(2), logits.sym_size(2)};
  }
  at::TensorOptions state_options() const { return h.options().dtype(detail::compute_type(h)); }
};

void check_device(const Call& call, const char* name, const Tensor& tensor) {
  if (tensor.device() == call.h.device()) return;
  detail::refuse(kOp, fmt::format("{} must be on {} like h, got {}", name, call.h.device().str(),
                                  tensor.device().str()));
}

void check_per_token(const Call& call, const char* name, const Tensor& tensor) {
  detail::check_shape(kOp, name, tensor, "[B, T]", call.tokens());
  detail::check_type(kOp, name, tensor, {call.h.scalar_type(), at::kFloat});
  check_device(call, name, tensor);
}

void check_state(const Call& call, const char* name, const Tensor& state) {
  detail::check_shape(kOp, name, state, "[B, D, N]", call.state_shape());
  detail::check_type(kOp, name, state, {detail::compute_type(call.h)});
  check_device(call, name, state);
}

void check(const Call& call) {
  const auto& h = call.h;
  if (h.dim() != 3) {
    detail::refuse(kOp, "h must be [B, T, D], got " + detail::shape_text(h.sym_sizes()));
  }
  detail::check_type(kOp, "h", h, {at::kBFloat16, at::kHalf, at::kFloat, at::kDouble});
  if (call.logits.dim() != 3 || call.logits.sym_size(2) < 1) {
    detail::refuse(kOp, "logits must be [B, T, N] with N of at least 1, got " +
                            detail::shape_text(call.logits.sym_sizes()));
  }
  detail::check_shape(kOp, "logits", call.logits, "[B, T, N]",
                      {h.sym_size(0), h.sym_size(1), call.logits.sym_size(2)});
  detail::check_type(kOp, "logits", call.logits, {h.scalar_type(), at::kFloat});
  check_device(call, "logits", call.logits);
  detail::check_shape(kOp, "target", call.target, "[B, T]", call.tokens());
  detail::check_type(kOp, "target", call.target, {at::kLong});
  check_device(call, "target", call.target);
  check_per_token(call, "eta", call.eta);
  if (call.g.defined()) check_per_token(call, "g", call.g);
  if (call.initial_state.defined()) check_state(call, "initial_state", call.initial_state);
}

/// On the CPU the targets can be looked at.
void check_targets(const Call& call) {
  const auto vocabulary = call.logits.size(2);
  const auto tokens = call.target.size(1);
  const auto* target = call.target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < call.target.numel(); ++i) {
    if (target[i] < vocabulary) continue;
    detail::refuse(kOp, fmt::format("target must be below N = {}, got {} at [{}, {}]", vocabulary,
                                    target[i], i / tokens, i % tokens));
  }
}

// ---- kernels -----------------------------------------------------------------------------------

Call contiguous(Call call) {
  for (Tensor* tensor :
       {&call.h, &call.logits, &call.target, &call.eta, &call.g, &call.initial_state}) {
    detail::make_contiguous(*tensor);
  }
  return call;
}

template <class Real>
core::SoftmaxDeltaRuleParams<Real> params_of(const Call& call, const Tensor& corrected) {
  core::SoftmaxDeltaRuleParams<Real> params;
  params.B = call.h.size(0);
  params.T = call.h.size(1);
  params.D = call.h.size(2);
  params.N = corrected.size(2);
  params.pending = call.pending;
  params.h = detail::const_array(call.h);
  params.logits = detail::const_array(call.logits);
  params.target = call.target.const_data_ptr<int64_t>();
  params.eta = detail::const_array(call.eta);
  params.g = detail::const_array(call.g);
  if (call.initial_state.defined())
    params.initial_state = call.initial_state.const_data_ptr<Real>();
  params.corrected = detail::array(corrected);
  return params;
}

/// Threads that share a row meet at every chunk, which costs more than they save where the state is
/// small; starting them costs more than a step of one token.
template <class Real>
core::Executor executor_for(const core::SoftmaxDeltaRuleParams<Real>& params) {
  constexpr int64_t kFewProducts = 1 << 18;
  constexpr int64_t kSmallState = 1 << 17;
  const auto state = params.D * params.N;
  const bool few = params.B * params.T * state <= kFewProducts;
  const bool shared = params.B < at::get_num_threads();
  return few || (shared && state <= kSmallState) ? core::serial_executor()
                                                 : detail::parallel_executor();
}

/// Runs the forward pass; `final_state` may be the initial one.
Tensor run(const Call& call, const Tensor& final_state) {
  check_targets(call);
  Tensor corrected = at::empty(call.logits.sizes(), call.logits.options());
  detail::with_real(call.h, [&](auto real) {
    using Real = decltype(real);
    auto params = params_of<Real>(call, corrected);
    params.final_state = final_state.mutable_data_ptr<Real>();
    cpu::softmax_delta_rule_forms<Real>().forward(params, executor_for(params));
  });
  return corrected;
}

Call make_call(const Tensor& h, const Tensor& logits, const Tensor& target, const Tensor& eta,
               const OptionalTensor& g, const OptionalTensor& initial_state, bool pending) {
  return {h, logits, target, eta, g.value_or(Tensor()), initial_state.value_or(Tensor()), pending};
}

using Forward = std::tuple<Tensor, Tensor>;

Forward forward_cpu(const Tensor& h, const Tensor& logits, const Tensor& target, const Tensor& eta,
                    const OptionalTensor& g, const OptionalTensor& initial_state,
                    bool output_final_state, bool pending) {
  Call call = make_call(h, logits, target, eta, g, initial_state, pending);
  check(call);
  call = contiguous(std::move(call));
  const Tensor state = at::empty_symint(call.state_shape(), call.state_options());
  Tensor corrected = run(call, state);
  return {corrected, output_final_state ? state : at::empty({0}, call.state_options())};
}

Forward forward_meta(const Tensor& h, const Tensor& logits, const Tensor& target, const Tensor& eta,
                     const OptionalTensor& g, const OptionalTensor& initial_state,
                     bool output_final_state, bool pending) {
  const Call call = make_call(h, logits, target, eta, g, initial_state, pending);
  check(call);
  return {at::empty_symint(logits.sym_sizes(), logits.options()),
          output_final_state ? at::empty_symint(call.state_shape(), call.state_options())
                             : at::empty({0}, call.state_options())};
}

Tensor recurrent_cpu(const Tensor& h, const Tensor& logits, const Tensor& target, const Tensor& eta,
                     const OptionalTensor& g, const Tensor& state, bool pending) {
  Call call = make_call(h, logits, target, eta, g, std::nullopt, pending);
  check(call);
  check_state(call, "state", state);
  call.initial_state = state;
  call = contiguous(std::move(call));
  Tensor corrected = run(call, call.initial_state);
  if (!call.initial_state.is_same(state)) state.copy_(call.initial_state);
  return corrected;
}

Tensor recurrent_meta(const Tensor& h, const Tensor& logits, const Tensor& target,
                      const Tensor& eta, const OptionalTensor& g, const Tensor& state,
                      bool pending) {
  const Call call = make_call(h, logits, target, eta, g, std::nullopt, pending);
  check(call);
  check_state(call, "state", state);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

// ---- gradients ---------------------------------------------------------------------------------

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

/// Gradients of h, logits, eta, g and initial_state, not yet filled.
Backward make_gradients(const Call& call) {
  const auto like = [](const Tensor& tensor) {
    return at::empty_symint(tensor.sym_sizes(), tensor.options());
  };
  return {like(call.h), like(call.logits), like(call.eta),
          call.g.defined() ? like(call.g) : at::empty({0}, call.h.options()),
          at::empty_symint(call.state_shape(), call.state_options())};
}

Backward backward_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& h,
                       const Tensor& target, const Tensor& eta, const OptionalTensor& g,
                       const OptionalTensor& initial_state, const Tensor& corrected, bool pending) {
  return make_gradients(make_call(h, corrected, target, eta, g, initial_state, pending));
}

Backward backward_cpu(const OptionalTensor& d_corrected, const OptionalTensor& d_final_state,
                      const Tensor& h, const Tensor& target, const Tensor& eta,
                      const OptionalTensor& g, const OptionalTensor& initial_state,
                      const Tensor& corrected, bool pending) {
  Call call = make_call(h, corrected, target, eta, g, initial_state, pending);
  check(call);
  call = contiguous(std::move(call));
  check_targets(call);
  Tensor outer = d_corrected.value_or(Tensor());
  Tensor d_state = d_final_state.value_or(Tensor());
  if (outer.defined()) {
    detail::check_shape(kOp, "d_corrected", outer, "[B, T, N]", call.logits.sym_sizes());
  }
  if (d_state.defined()) check_state(call, "d_final_state", d_state);
  detail::make_contiguous(outer);
  detail::make_contiguous(d_state);
  auto results = make_gradients(call);
  detail::with_real(h, [&](auto real) {
    using Real = decltype(real);
    auto& [d_h, d_logits, d_eta, d_g, d_initial_state] = results;
    core::SoftmaxDeltaRuleGradients<Real> gradients;
    gradients.d_corrected = detail::const_array(outer);
    if (d_state.defined()) gradients.d_final_state = d_state.const_data_ptr<Real>();
    gradients.d_h = detail::array(d_h);
    gradients.d_logits = detail::array(d_logits);
    gradients.d_eta = detail::array(d_eta);
    if (call.g.defined()) gradients.d_g = detail::array(d_g);
    gradients.d_initial_state = d_initial_state.template mutable_data_ptr<Real>();
    const auto params = params_of<Real>(call, call.logits);
    cpu::softmax_delta_rule_forms<Real>().backward(params, gradients, executor_for(params));
  });
  return results;
}

using ForwardSignature = Forward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const OptionalTensor&, const OptionalTensor&, bool, bool);
using RecurrentSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                  const OptionalTensor&, const Tensor&, bool);
using BackwardSignature = Backward(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                   const Tensor&, const Tensor&, const OptionalTensor&,
                                   const OptionalTensor&, const Tensor&, bool);

OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

/// Keeps its inputs and the corrected logits, from which everything else is made again.
struct SoftmaxDeltaRuleNode : torch::autograd::Node {
  enum Saved { kHidden, kTarget, kEta, kGate, kState, kCorrected, kSaved };

  std::string name() const override { return "fastweights::softmax_delta_rule_backward"; }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& d_outputs) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    torch::autograd::variable_list results(5);
    if (!d_outputs[0].defined() && !(d_outputs.size() > 1 && d_outputs[1].defined())) {
      return results;
    }
    static const auto op =
        detail::find_operator<BackwardSignature>("fastweights::softmax_delta_rule_backward");
    std::vector<Tensor> tensors;
    for (const auto& variable : saved) tensors.push_back(variable.unpack());
    auto [d_h, d_logits, d_eta, d_g, d_state] = op.call(
        if_defined(d_outputs[0]), d_outputs.size() > 1 ? if_defined(d_outputs[1]) : std::nullopt,
        tensors[kHidden], tensors[kTarget], tensors[kEta], if_defined(tensors[kGate]),
        if_defined(tensors[kState]), tensors[kCorrected], pending);
    Tensor* gradients[] = {&d_h, &d_logits, &d_eta, &d_g, &d_state};
    for (std::size_t i = 0; i < results.size(); ++i) {
      if (should_compute_output(i)) results[i] = std::move(*gradients[i]);
    }
    return results;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  bool pending = false;
  std::vector<torch::autograd::SavedVariable> saved;
};

Forward call_forward(const Call& call, bool output_final_state) {
  static const auto op = detail::find_operator<ForwardSignature>("fastweights::softmax_delta_rule");
  return op.call(call.h, call.logits, call.target, call.eta, if_defined(call.g),
                 if_defined(call.initial_state), output_final_state, call.pending);
}

Forward forward_autograd(const Tensor& h, const Tensor& logits, const Tensor& target,
                         const Tensor& eta, const OptionalTensor& g,
                         const OptionalTensor& initial_state, bool output_final_state,
                         bool pending) {
  const Call call = make_call(h, logits, target, eta, g, initial_state, pending);
  const std::vector<Tensor> inputs{h, logits, eta, call.g, call.initial_state};
  detail::refuse_forward_mode(kOp, inputs);
  bool differentiable = false;
  for (const auto& input : inputs) {
    differentiable = differentiable || (input.defined() && input.requires_grad());
  }
  auto results = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_forward(call, output_final_state);
  }();
  if (!differentiable || !at::GradMode::is_enabled()) return results;
  auto& [corrected, final_state] = results;
  auto* node = new SoftmaxDeltaRuleNode();
  const auto owner = detail::own_node(node);
  node->pending = pending;
  torch::autograd::edge_list edges;
  for (const auto& input : inputs) {
    edges.push_back(input.defined() ? torch::autograd::impl::gradient_edge(input)
                                    : torch::autograd::Edge());
  }
  node->set_next_edges(std::move(edges));
  for (const auto& tensor : {h, target, eta, call.g, call.initial_state, corrected.detach()}) {
    node->saved.emplace_back(tensor, /*is_output=*/false);
  }
  torch::autograd::set_history(corrected, owner);
  if (output_final_state) torch::autograd::set_history(final_state, owner);
  return results;
}

Tensor call_recurrent(const Call& call, const Tensor& state) {
  static const auto op =
      detail::find_operator<RecurrentSignature>("fastweights::softmax_delta_rule_recurrent_");
  return op.call(call.h, call.logits, call.target, call.eta, if_defined(call.g), state,
                 call.pending);
}

/// The recurrent form has no derivative: a backward pass through it is an error.
Tensor recurrent_autograd(const Tensor& h, const Tensor& logits, const Tensor& target,
                          const Tensor& eta, const OptionalTensor& g, const Tensor& state,
                          bool pending) {
  const Call call = make_call(h, logits, target, eta, g, state, pending);
  torch::autograd::edge_list edges;
  for (const auto& input : {h, logits, eta, call.g, state}) {
    detail::refuse_forward_mode(kOp, input);
    if (!input.defined() || !input.requires_grad() || !at::GradMode::is_enabled()) continue;
    edges.push_back(torch::autograd::impl::gradient_edge(input));
  }
  if (!edges.empty()) torch::autograd::check_inplace(state, true);
  Tensor corrected = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_recurrent(call, state);
  }();
  if (!state.is_inference()) torch::autograd::increment_version(state);
  if (edges.empty()) return corrected;
  auto* node = new torch::autograd::NotImplemented("fastweights::softmax_delta_rule_recurrent_");
  const auto owner = detail::own_node(node);
  node->set_next_edges(std::move(edges));
  torch::autograd::set_history(corrected, owner);
  if (state.requires_grad()) {
    torch::autograd::impl::rebase_history(state, {owner, owner->add_input_metadata(state)});
  }
  return corrected;
}

}  // namespace

SoftmaxDeltaRuleResult softmax_delta_rule(const Tensor& h, const Tensor& logits,
                                          const Tensor& target, const Tensor& eta,
                                          const SoftmaxDeltaRuleOptions& options) {
  auto [corrected, state] = call_forward(
      make_call(h, logits, target, eta, options.g, options.initial_state, options.pending),
      options.output_final_state);
  return {corrected, options.output_final_state ? OptionalTensor(state) : std::nullopt};
}

Tensor softmax_delta_rule_recurrent_(const Tensor& h, const Tensor& logits, const Tensor& target,
                                     const Tensor& eta, const OptionalTensor& g, Tensor& state,
                                     bool pending) {
  return call_recurrent(make_call(h, logits, target, eta, g, std::nullopt, pending), state);
}

}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "softmax_delta_rule(Tensor h, Tensor logits, Tensor target, Tensor eta, Tensor? g=None, "
      "Tensor? initial_state=None, bool output_final_state=False, bool pending=False) "
      "-> (Tensor logits, Tensor final_state)");
  m.def(
      "softmax_delta_rule_backward(Tensor? d_corrected, Tensor? d_final_state, Tensor h, "
      "Tensor target, Tensor eta, Tensor? g, Tensor? initial_state, Tensor corrected, "
      "bool pending) -> (Tensor d_h, Tensor d_logits, Tensor d_eta, Tensor d_g, "
      "Tensor d_initial_state)");
  m.def(
      "softmax_delta_rule_recurrent_(Tensor h, Tensor logits, Tensor target, Tensor eta, "
      "Tensor? g, Tensor(a!) state, bool pending=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("softmax_delta_rule", fastweights::forward_cpu);
  m.impl("softmax_delta_rule_backward", fastweights::backward_cpu);
  m.impl("softmax_delta_rule_recurrent_", fastweights::recurrent_cpu);
}

TORCH_LIBRARY_IMPL(fastweights, Meta, m) {
  m.impl("softmax_delta_rule", fastweights::forward_meta);
  m.impl("softmax_delta_rule_backward", fastweights::backward_meta);
  m.impl("softmax_delta_rule_recurrent_", fastweights::recurrent_meta);
}

TORCH_LIBRARY_IMPL(fastweights, Autograd, m) {
  m.impl("softmax_delta_rule", fastweights::forward_autograd);
  m.impl("softmax_delta_rule_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("softmax_delta_rule_recurrent_", fastweights::recurrent_autograd);
}
