#include "rule_call.hpp"

#include <ATen/autocast_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/torch.h>

#include <cmath>
#include <mutex>
#include <string>
#include <vector>

#include "autograd_node.hpp"
#include "fastweights/core/cpu.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/core/params.hpp"
#include "layer_op.hpp"

namespace fastweights::detail {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ----------------------------------------------------------------------------------

std::string shape_text(c10::SymIntArrayRef sizes) {
  std::vector<std::string> parts;
  for (const auto& size : sizes) {
    const auto known = size.maybe_as_int();
    parts.push_back(known ? std::to_string(*known) : "?");
  }
  return fmt::format("[{}]", fmt::join(parts, ", "));
}

bool equal_shapes(c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

[[noreturn]] void refuse(const RuleCall& call, const std::string& message) {
  throw ShapeError(fmt::format("{}: {}", call.rule, message));
}

void check_shape(const RuleCall& call, const char* name, const Tensor& tensor, const char* letters,
                 const std::vector<c10::SymInt>& expected) {
  if (equal_shapes(tensor.sym_sizes(), expected)) return;
  refuse(call, fmt::format("{} must be {} = {}, got {}", name, letters, shape_text(expected),
                           shape_text(tensor.sym_sizes())));
}

void check_type(const RuleCall& call, const char* name, const Tensor& tensor,
                std::initializer_list<at::ScalarType> allowed) {
  std::vector<std::string> names;
  for (const auto type : allowed) {
    if (tensor.scalar_type() == type) return;
    if (names.empty() || names.back() != c10::toString(type)) names.push_back(c10::toString(type));
  }
  refuse(call, fmt::format("{} must be {}, got {}", name, fmt::join(names, " or "),
                           c10::toString(tensor.scalar_type())));
}

void check_device(const RuleCall& call, const char* name, const Tensor& tensor) {
  if (tensor.device() == call.q.device()) return;
  refuse(call, fmt::format("{} must be on {} like q, got {}", name, call.q.device().str(),
                           tensor.device().str()));
}

at::ScalarType state_type(const Tensor& v) {
  return v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_head_size(const RuleCall& call, const char* name, const c10::SymInt& size) {
  const auto known = size.maybe_as_int();
  if (known && (*known < 1 || *known > core::kMaxHeadSize)) {
    refuse(call, fmt::format("{} must be from 1 to {}, got {}", name, core::kMaxHeadSize, *known));
  }
}

void check_features(const RuleCall& call) {
  if (call.q.dim() != 4) {
    refuse(call, "q must be [B, T, H, K], got " + shape_text(call.q.sym_sizes()));
  }
  check_type(call, "q", call.q, {at::kBFloat16, at::kHalf, at::kFloat, at::kDouble});
  const auto q = call.q.sym_sizes();
  check_shape(call, "k", call.k, "[B, T, H, K]", {q[0], q[1], q[2], q[3]});
  if (call.v.dim() != 4 || call.v.sym_size(0) != q[0] || call.v.sym_size(1) != q[1]) {
    refuse(call,
           fmt::format("v must be [B, T, HV, V] with B = {} and T = {}, got {}", shape_text({q[0]}),
                       shape_text({q[1]}), shape_text(call.v.sym_sizes())));
  }
  const auto heads = q[2].maybe_as_int();
  const auto value_heads = call.v.sym_size(2).maybe_as_int();
  if (heads && value_heads && (*heads < 1 || *value_heads < 1 || *value_heads % *heads != 0)) {
    refuse(call, fmt::format("v must have a positive multiple of q's heads, H = {}, got HV = {}",
                             *heads, *value_heads));
  }
  check_head_size(call, "K", q[3]);
  check_head_size(call, "V", call.v.sym_size(3));
  check_type(call, "k", call.k, {call.q.scalar_type()});
  check_type(call, "v", call.v, {call.q.scalar_type()});
  check_device(call, "k", call.k);
  check_device(call, "v", call.v);
}

void check_scalars(const RuleCall& call, const char* name, const Tensor& tensor) {
  const auto v = call.v.sym_sizes();
  check_shape(call, name, tensor, "[B, T, HV]", {v[0], v[1], v[2]});
  check_type(call, name, tensor, {call.q.scalar_type(), at::kFloat});
  check_device(call, name, tensor);
}

c10::SymInt sequences(const RuleCall& call) {
  return call.cu_seqlens ? call.cu_seqlens->sym_size(0) - 1 : call.q.sym_size(0);
}

std::vector<c10::SymInt> state_shape(const RuleCall& call) {
  return {sequences(call), call.v.sym_size(2), call.q.sym_size(3), call.v.sym_size(3)};
}

void check_state(const RuleCall& call, const char* name, const Tensor& state) {
  check_shape(call, name, state, call.cu_seqlens ? "[N, HV, K, V]" : "[B, HV, K, V]",
              state_shape(call));
  check_type(call, name, state, {state_type(call.v)});
  check_device(call, name, state);
}

void check_packing(const RuleCall& call) {
  const Tensor& cu_seqlens = *call.cu_seqlens;
  if (cu_seqlens.dim() != 1 || cu_seqlens.sym_size(0) < 1) {
    refuse(call, "cu_seqlens must be [N + 1], got " + shape_text(cu_seqlens.sym_sizes()));
  }
  check_type(call, "cu_seqlens", cu_seqlens, {at::kLong});
  check_device(call, "cu_seqlens", cu_seqlens);
  if (call.q.sym_size(0) != 1) {
    refuse(call,
           "cu_seqlens needs packed input with B = 1, got q " + shape_text(call.q.sym_sizes()));
  }
}

// ---- from tensors to the kernels ---------------------------------------------------------------

Tensor with_adjacent_rows(const Tensor& tensor) {
  return tensor.dim() < 4 || tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor
                                                                          : tensor.contiguous();
}

core::ConstView const_view(const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

core::View view(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

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
  core::DeltaRuleParams<Real> params() const {
    core::DeltaRuleParams<Real> p;
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

/// Calls `body` with a float or a double, the type of the arithmetic.
template <class Body>
void with_real(const Tensor& v, const Body& body) {
  if (v.scalar_type() == at::kDouble) {
    body(double{});
  } else {
    body(float{});
  }
}

Tensor empty_state(const RuleCall& call) {
  return at::empty_symint(state_shape(call), call.v.options().dtype(state_type(call.v)));
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
  if (call.cu_seqlens) check_packing(call);
  if (call.initial_state) check_state(call, "initial_state", *call.initial_state);
}

RuleOutputs rule_cpu(const RuleCall& source) {
  const PreparedCall prepared(source);
  const RuleCall& call = prepared.call;
  Tensor o = at::empty(call.v.sizes(), call.v.options());
  Tensor final_state = call.output_final_state
                           ? empty_state(call)
                           : at::empty({0}, call.v.options().dtype(state_type(call.v)));
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
  const auto options = call.v.options().dtype(state_type(call.v));
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
  check_state(call, "state", state);
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
  if (output) check_shape(call, "d_o", *output, "[B, T, HV, V]", call.v.sym_sizes().vec());
  if (state) check_state(call, "d_final_state", *state);
  with_real(call.v, [&](auto real) {
    using Real = decltype(real);
    const auto params = prepared.params<Real>();
    core::DeltaRuleGradients<Real> gradients;
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
