#include "rule_call.hpp"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/torch.h>

#include <cmath>
#include <mutex>
#include <string>
#include <vector>

#include "autograd_node.hpp"
#include "compute_type.hpp"
#include "fastweights/core/cpu.hpp"
#include "fastweights/core/rule.hpp"
#include "layer_op.hpp"
#include "rule_checks.hpp"

namespace fastweights::detail {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ----------------------------------------------------------------------------------

void check_features(const RuleCall& call) {
  check_query(call.rule, call.q);
  check_shape(call.rule, "k", call.k, "[B, T, H, K]", call.q.sym_sizes().vec());
  check_value(call.rule, call.q, call.v);
  check_type(call.rule, "k", call.k, {call.q.scalar_type()});
  check_type(call.rule, "v", call.v, {call.q.scalar_type()});
  check_device(call.rule, "k", call.k, call.q);
  check_device(call.rule, "v", call.v, call.q);
}

void check_scalars(const RuleCall& call, const char* name, const Tensor& tensor) {
  const auto v = call.v.sym_sizes();
  check_shape(call.rule, name, tensor, "[B, T, HV]", {v[0], v[1], v[2]});
  check_type(call.rule, name, tensor, {call.q.scalar_type(), at::kFloat});
  check_device(call.rule, name, tensor, call.q);
}

void check_call_state(const RuleCall& call, const char* name, const Tensor& state) {
  check_state(call.rule, name, state, call.q, call.v, call.cu_seqlens.value_or(Tensor()));
}

// ---- from tensors to the kernels ---------------------------------------------------------------

/// A call whose tensors have the layout that the kernels read; it keeps them alive.
struct PreparedCall {
  explicit PreparedCall(RuleCall source) : call(std::move(source)) {
    check_call(call);
    call.q = with_adjacent_rows(call.q);
    call.k = with_adjacent_rows(call.k);
    call.v = with_adjacent_rows(call.v);
    if (call.initial_state) call.initial_state = call.initial_state->contiguous();
    if (call.cu_seqlens) call.cu_seqlens = call.cu_seqlens->contiguous();
  }

  template <class Real>
  core::RuleParams<Real> params() const {
    core::RuleParams<Real> p;
    p.shape = {call.q.size(0), call.q.size(1), call.q.size(2),
               call.v.size(2), call.q.size(3), call.v.size(3)};
    if (call.cu_seqlens) {
      p.cu_seqlens = {call.cu_seqlens->const_data_ptr<std::int64_t>(),
                      static_cast<std::size_t>(call.cu_seqlens->numel())};
    }
    p.scale = call.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.shape.K)));
    p.use_qk_l2norm = call.use_qk_l2norm;
    p.q = const_view(call.q);
    p.k = const_view(call.k);
    p.v = const_view(call.v);
    p.beta = const_view(call.beta);
    if (call.g) p.g = const_view(*call.g);
    if (call.initial_state) p.initial_state = call.initial_state->const_data_ptr<Real>();
    return p;
  }

  RuleCall call;
};

Tensor empty_state(const RuleCall& call) {
  return at::empty_symint(state_shape(call.q, call.v, call.cu_seqlens.value_or(Tensor())),
                          call.v.options().dtype(compute_type(call.v)));
}

Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

// ---- autograd ----------------------------------------------------------------------------------

struct RuleNode : torch::autograd::Node {
  std::string name() const override { return "FastweightsRuleBackward"; }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto optional = [](const Tensor& tensor) {
      return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
    };
    const auto d_o = optional(gradients[0]);
    const auto d_state = gradients.size() > 1 ? optional(gradients[1]) : std::nullopt;
    if (!d_o && !d_state) return torch::autograd::variable_list(6);
    RuleCall call = arguments;
    call.q = q.unpack();
    call.k = k.unpack();
    call.v = v.unpack();
    call.g = optional(g.unpack());
    call.beta = beta.unpack();
    call.initial_state = optional(initial_state.unpack());
    call.cu_seqlens = optional(cu_seqlens.unpack());
    const RuleGradients d = entries.backward(call, d_o, d_state);
    const auto wanted = [this](size_t index, const Tensor& gradient) {
      return should_compute_output(index) ? gradient : Tensor();
    };
    return {wanted(0, d.q), wanted(1, d.k),    wanted(2, d.v),
            wanted(3, d.g), wanted(4, d.beta), wanted(5, d.initial_state)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&q, &k, &v, &g, &beta, &initial_state, &cu_seqlens}) saved->reset_data();
  }

  void save(const RuleCall& call) {
    const auto save_optional = [](const OptionalTensor& tensor) {
      return torch::autograd::SavedVariable(tensor.value_or(Tensor()), false);
    };
    q = {call.q, false};
    k = {call.k, false};
    v = {call.v, false};
    g = save_optional(call.g);
    beta = {call.beta, false};
    initial_state = save_optional(call.initial_state);
    cu_seqlens = save_optional(call.cu_seqlens);
    arguments.rule = call.rule;
    arguments.scale = call.scale;
    arguments.output_final_state = call.output_final_state;
    arguments.use_qk_l2norm = call.use_qk_l2norm;
  }

  RuleCall arguments;  // without its tensors
  RuleEntries entries{};
  torch::autograd::SavedVariable q, k, v, g, beta, initial_state, cu_seqlens;
};

NodePointer make_node(const RuleCall& call, const RuleEntries& entries) {
  const Tensor g = call.g.value_or(Tensor());
  const Tensor initial = call.initial_state.value_or(Tensor());
  if (!torch::autograd::compute_requires_grad(call.q, call.k, call.v, g, call.beta, initial)) {
    return nullptr;
  }
  auto* node = new RuleNode();
  NodePointer owner = own_node(node);
  node->set_next_edges(
      torch::autograd::collect_next_edges(call.q, call.k, call.v, g, call.beta, initial));
  node->entries = entries;
  node->save(call);
  return owner;
}

}  // namespace

void check_call(const RuleCall& call) {
  check_features(call);
  check_scalars(call, "beta", call.beta);
  if (call.g) check_scalars(call, "g", *call.g);
  if (call.cu_seqlens) check_packing(call.rule, call.q, *call.cu_seqlens);
  if (call.initial_state) check_call_state(call, "initial_state", *call.initial_state);
}

RuleOutputs rule_cpu(const RuleCall& source) {
  const PreparedCall prepared(source);
  const RuleCall& call = prepared.call;
  Tensor o = at::empty(call.v.sizes(), call.v.options());
  Tensor final_state = call.output_final_state
                           ? empty_state(call)
                           : at::empty({0}, call.v.options().dtype(compute_type(call.v)));
  with_real(call.v, [&](auto real) {
    using Real = decltype(real);
    auto params = prepared.params<Real>();
    params.o = view(o);
    if (call.output_final_state) params.final_state = final_state.mutable_data_ptr<Real>();
    if (call.g) {
      cpu::gated_delta_rule(params, parallel_executor());
    } else {
      cpu::delta_rule(params, parallel_executor());
    }
  });
  return {o, final_state};
}

RuleOutputs rule_meta(const RuleCall& call) {
  check_call(call);
  Tensor o = at::empty_symint(call.v.sym_sizes(), call.v.options());
  const auto options = call.v.options().dtype(compute_type(call.v));
  return {o, call.output_final_state ? empty_state(call) : at::empty({0}, options)};
}

RuleOutputs rule_autograd(const RuleCall& call, const RuleEntries& entries) {
  refuse_forward_mode(call.rule, {call.q, call.k, call.v, call.g.value_or(Tensor()), call.beta,
                                  call.initial_state.value_or(Tensor())});
  const auto node = make_node(call, entries);
  auto [o, final_state] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return entries.forward(call);
  }();
  if (node) {
    torch::autograd::set_history(o, node);
    if (call.output_final_state) torch::autograd::set_history(final_state, node);
  }
  return {o, final_state};
}

RuleOutputs rule_autocast(RuleCall call, const RuleEntries& entries) {
  const auto device = call.q.device().type();
  const c10::impl::ExcludeDispatchKeyGuard guard(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto type = at::autocast::get_autocast_dtype(device);
  for (auto* tensor : {&call.q, &call.k, &call.v}) {
    *tensor = at::autocast::cached_cast(type, *tensor, device);
  }
  // beta and g keep their type where the rule takes it; the other 16-bit type does not go with
  // `type`.
  const auto settle = [&](Tensor& tensor) {
    if (tensor.scalar_type() != call.q.scalar_type()) tensor = tensor.to(at::kFloat);
  };
  settle(call.beta);
  if (call.g) settle(*call.g);
  return entries.forward(call);
}

Tensor rule_recurrent_cpu(const RuleCall& source, Tensor& state) {
  const PreparedCall prepared(source);
  const RuleCall& call = prepared.call;
  check_call_state(call, "state", state);
  Tensor o = at::empty(call.v.sizes(), call.v.options());
  Tensor working = state.contiguous();
  with_real(call.v, [&](auto real) {
    using Real = decltype(real);
    auto params = prepared.params<Real>();
    params.o = view(o);
    params.initial_state = params.final_state = working.mutable_data_ptr<Real>();
    if (call.g) {
      cpu::gated_delta_rule_recurrent(params, parallel_executor());
    } else {
      cpu::delta_rule_recurrent(params, parallel_executor());
    }
  });
  if (!working.is_same(state)) state.copy_(working);
  return o;
}

RuleGradients rule_backward_meta(const RuleCall& call) {
  const auto like = [](const Tensor& tensor) {
    return at::empty_symint(tensor.sym_sizes(), tensor.options());
  };
  return {like(call.q),    like(call.k),
          like(call.v),    call.g ? like(*call.g) : nothing(call.beta),
          like(call.beta), call.initial_state ? like(*call.initial_state) : nothing(call.beta)};
}

RuleGradients rule_backward_cpu(const RuleCall& source, const OptionalTensor& d_o,
                                const OptionalTensor& d_final_state) {
  const PreparedCall prepared(source);
  const RuleCall& call = prepared.call;
  RuleGradients out = rule_backward_meta(call);
  const OptionalTensor output = d_o ? OptionalTensor(with_adjacent_rows(*d_o)) : std::nullopt;
  const OptionalTensor state =
      d_final_state ? OptionalTensor(d_final_state->contiguous()) : std::nullopt;
  if (output) check_shape(call.rule, "d_o", *output, "[B, T, HV, V]", call.v.sym_sizes().vec());
  if (state) check_call_state(call, "d_final_state", *state);
  with_real(call.v, [&](auto real) {
    using Real = decltype(real);
    const auto params = prepared.params<Real>();
    core::RuleGradients<Real> gradients;
    if (output) gradients.d_o = const_view(*output);
    if (state) gradients.d_final_state = state->const_data_ptr<Real>();
    gradients.d_q = view(out.q);
    gradients.d_k = view(out.k);
    gradients.d_v = view(out.v);
    gradients.d_beta = view(out.beta);
    if (call.initial_state) {
      gradients.d_initial_state = out.initial_state.mutable_data_ptr<Real>();
    }
    if (call.g) {
      gradients.d_g = view(out.g);
      cpu::gated_delta_rule_backward(params, gradients, parallel_executor());
    } else {
      cpu::delta_rule_backward(params, gradients, parallel_executor());
    }
  });
  return out;
}

}  // namespace fastweights::detail
