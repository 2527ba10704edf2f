#include "rule_kernels.hpp"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "compute_type.hpp"
#include "layer_op.hpp"
#include "rule_checks.hpp"

namespace fastweights::detail {
namespace {

using at::Tensor;

// ---- checks ------------------------------------------------------------------------------------

void check_input_shape(const Call& call, const RuleInput& input, const Tensor& tensor) {
  const auto check = [&](const char* letters, c10::SymIntArrayRef sizes) {
    check_shape(call.name(), input.name, tensor, letters, sizes);
  };
  const auto q = call.q().sym_sizes();
  const auto v = call.v().sym_sizes();
  switch (input.layout) {
    case Layout::kKeys: return check("[B, T, H, K]", q);
    case Layout::kValues: return check("[B, T, HV, V]", v);
    case Layout::kGates: return check("[B, T, HV]", v.slice(0, 3));
    case Layout::kChannelGates: return check("[B, T, HV, K]", {v[0], v[1], v[2], q[3]});
  }
}

void check_input(const Call& call, const RuleInput& input, const Tensor& tensor) {
  if (input.optional && !tensor.defined()) return;
  check_input_shape(call, input, tensor);
  const auto type = call.q().scalar_type();
  if (input.layout == Layout::kKeys || input.layout == Layout::kValues) {
    check_type(call.name(), input.name, tensor, {type});
  } else {
    check_type(call.name(), input.name, tensor, {type, at::kFloat});
  }
  check_device(call.name(), input.name, tensor, call.q());
}

void check_call_state(const Call& call, const char* name, const Tensor& state) {
  check_state(call.name(), name, state, call.q(), call.v(), call.cu_seqlens);
}

/// The type of a call's states: what they were given in, else that of the arithmetic.
at::ScalarType state_type(const Call& call) {
  for (const auto& state : call.states) {
    if (state.defined()) return state.scalar_type();
  }
  return compute_type(call.v());
}

/// Throws ShapeError unless shapes, types and devices fit; works on symbolic shapes.
void check(const Call& call) {
  check_query(call.name(), call.q());
  check_value(call.name(), call.q(), call.v());
  for (std::size_t i = 0; i < call.inputs.size(); ++i) {
    check_input(call, call.spec().inputs[i], call.inputs[i]);
  }
  if (call.cu_seqlens.defined()) check_packing(call.name(), call.q(), call.cu_seqlens);
  for (std::size_t i = 0; i < state_count(call.spec()); ++i) {
    const auto& state = call.states[i];
    const char* name = call.in_place ? kStates[i] : kInitialStates[i];
    if (!call.in_place && !state.defined()) continue;
    check_call_state(call, name, state);
    check_type(call.name(), name, state, {state_type(call)});
  }
}

/// The values of cu_seqlens, which lie on the CPU here.
void check_sequences(const Call& call) {
  if (!call.cu_seqlens.defined()) return;
  const auto ends = call.cu_seqlens.accessor<std::int64_t, 1>();
  const std::int64_t last = ends.size(0) - 1;
  if (ends[0] != 0 || ends[last] != call.q().size(1)) {
    refuse(call.name(),
           fmt::format("cu_seqlens must begin with 0 and end with T = {}, got {} and {}",
                       call.q().size(1), ends[0], ends[last]));
  }
  for (std::int64_t i = 1; i <= last; ++i) {
    if (ends[i] < ends[i - 1]) {
      refuse(call.name(),
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

template <class Real, class Params = core::RuleParams<Real>,
          class Gradients = core::RuleGradients<Real>>
constexpr std::array kMembers = {Member<Real>{"q", &Params::q, &Gradients::d_q},
                                 Member<Real>{"k", &Params::k, &Gradients::d_k},
                                 Member<Real>{"v", &Params::v, &Gradients::d_v},
                                 Member<Real>{"g", &Params::g, &Gradients::d_g},
                                 Member<Real>{"beta", &Params::beta, &Gradients::d_beta},
                                 Member<Real>{"a", &Params::a, &Gradients::d_a},
                                 Member<Real>{"b", &Params::b, &Gradients::d_b},
                                 Member<Real>{"p", &Params::p, &Gradients::d_p},
                                 Member<Real>{"mu", &Params::mu, &Gradients::d_mu},
                                 Member<Real>{"eta", &Params::eta, &Gradients::d_eta}};

/// Checks a call and gives its tensors the layout that the kernels read.
void prepare(Call& call) {
  check(call);
  for (auto& tensor : call.inputs) make_rows_adjacent(tensor);
  for (auto& state : call.states) make_contiguous(state);
  make_contiguous(call.cu_seqlens);
  check_sequences(call);
}

/// The chunkwise forms take their time over a state: one in bf16 is widened before and rounded
/// after.
void widen(Tensor& state) {
  if (state.defined() && state.scalar_type() == at::kBFloat16) state = state.to(at::kFloat);
}

template <class Real>
const Real* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<Real>() : nullptr;
}

/// Where a recurrent form finds a state.
template <class Real>
void aim(const Tensor& state, Real*& working, std::uint16_t*& narrow) {
  if (!state.defined()) return;
  if (state.scalar_type() == at::kBFloat16) {
    narrow = reinterpret_cast<std::uint16_t*>(state.mutable_data_ptr<at::BFloat16>());
  } else {
    working = state.mutable_data_ptr<Real>();
  }
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
  if (!std::isfinite(p.scale)) refuse(call.name(), "scale must be finite");
  p.use_qk_l2norm = call.use_qk_l2norm;
  for (std::size_t i = 0; i < call.inputs.size(); ++i) {
    if (call.spec().inputs[i].layout == Layout::kChannelGates) p.channel_gate = true;
    if (call.inputs[i].defined()) {
      p.*kMembers<Real>[call.rule.members[i]].input = const_view(call.inputs[i]);
    }
  }
  if (state_type(call) == at::kBFloat16) return p;
  p.initial_state = data_or_null<Real>(call.states[0]);
  p.initial_momentum = data_or_null<Real>(call.states[1]);
  return p;
}

template <class Real>
const core::RuleForms<Real>& forms_of(const Call& call) {
  if constexpr (std::is_same_v<Real, double>) {
    return call.spec().forms_double();
  } else {
    return call.spec().forms();
  }
}

/// o, and the final states where they are wanted, else empty tensors.
CallTensors empty_outputs(const Call& call) {
  const auto& v = call.v();
  CallTensors outputs = {at::empty_symint(v.sym_sizes(), v.options())};
  const auto options = v.options().dtype(state_type(call));
  for (std::size_t i = 0; i < state_count(call.spec()); ++i) {
    outputs.push_back(call.output_final_state
                          ? at::empty_symint(state_shape(call.q(), v, call.cu_seqlens), options)
                          : at::empty({0}, options));
  }
  return outputs;
}

void check_gradients(const BackwardCall& source) {
  const auto& [call, d_outputs] = source;
  if (d_outputs[0].defined()) {
    check_shape(call.name(), "d_o", d_outputs[0], "[B, T, HV, V]", call.v().sym_sizes());
  }
  for (std::size_t i = 1; i < d_outputs.size(); ++i) {
    const char* name = i == 1 ? "d_final_state" : "d_final_momentum";
    if (d_outputs[i].defined()) check_call_state(call, name, d_outputs[i]);
  }
}

/// The kernels' gradients: what is given, and where the results go.
template <class Real>
core::RuleGradients<Real> gradients_of(const BackwardCall& source, const CallTensors& results) {
  const Call& call = source.call;
  const CallTensors& d_outputs = source.d_outputs;
  core::RuleGradients<Real> d;
  if (d_outputs[0].defined()) d.d_o = const_view(d_outputs[0]);
  d.d_final_state = data_or_null<Real>(d_outputs[1]);
  if (call.spec().momentum) d.d_final_momentum = data_or_null<Real>(d_outputs[2]);
  for (std::size_t i = 0; i < call.inputs.size(); ++i) {
    if (call.inputs[i].defined()) {
      d.*kMembers<Real>[call.rule.members[i]].gradient = view(results[i]);
    }
  }
  const auto wanted = [&](std::size_t i) {
    return call.states[i].defined()
               ? results[call.inputs.size() + i].template mutable_data_ptr<Real>()
               : nullptr;
  };
  d.d_initial_state = wanted(0);
  d.d_initial_momentum = wanted(1);
  return d;
}

}  // namespace

std::size_t member_index(const char* name) {
  for (std::size_t i = 0; i < kMembers<float>.size(); ++i) {
    if (kMembers<float>[i].name == name) return i;
  }
  throw std::logic_error("no rule input " + std::string(name));
}

CallTensors forward_cpu(Call call) {
  prepare(call);
  const auto type = state_type(call);
  for (auto& state : call.states) widen(state);
  CallTensors outputs = empty_outputs(call);
  with_real(call.v(), [&](auto real) {
    using Real = decltype(real);
    auto params = params_of<Real>(call);
    params.o = view(outputs[0]);
    if (call.output_final_state) {
      params.final_state = outputs[1].template mutable_data_ptr<Real>();
      if (call.spec().momentum) {
        params.final_momentum = outputs[2].template mutable_data_ptr<Real>();
      }
    }
    forms_of<Real>(call).forward(params, parallel_executor());
  });
  for (std::size_t i = 1; i < outputs.size(); ++i) outputs[i] = outputs[i].to(type);
  return outputs;
}

CallTensors forward_meta(const Call& call) {
  check(call);
  return empty_outputs(call);
}

CallTensors backward_cpu(BackwardCall source) {
  prepare(source.call);
  check_gradients(source);
  make_rows_adjacent(source.d_outputs[0]);
  const auto type = state_type(source.call);
  for (auto& state : source.call.states) widen(state);
  for (std::size_t i = 1; i < source.d_outputs.size(); ++i) {
    make_contiguous(source.d_outputs[i]);
    widen(source.d_outputs[i]);
  }
  CallTensors results = backward_meta(source.call);
  with_real(source.call.v(), [&](auto real) {
    using Real = decltype(real);
    forms_of<Real>(source.call)
        .backward(params_of<Real>(source.call), gradients_of<Real>(source, results),
                  parallel_executor());
  });
  for (std::size_t i = 0; i < state_count(source.call.spec()); ++i) {
    if (!source.call.states[i].defined()) continue;
    Tensor& gradient = results[source.call.inputs.size() + i];
    gradient = gradient.to(type);
  }
  return results;
}

CallTensors backward_meta(const Call& call) {
  CallTensors gradients;
  const auto add = [&](const Tensor& tensor) {
    gradients.push_back(tensor.defined() ? at::empty_symint(tensor.sym_sizes(), tensor.options())
                                         : at::empty({0}, call.v().options()));
  };
  for (const auto& input : call.inputs) add(input);
  for (std::size_t i = 0; i < state_count(call.spec()); ++i) add(call.states[i]);
  return gradients;
}

Tensor recurrent_cpu(Call call) {
  const auto states = call.states;
  prepare(call);
  Tensor o = at::empty(call.v().sizes(), call.v().options());
  with_real(call.v(), [&](auto real) {
    using Real = decltype(real);
    auto params = params_of<Real>(call);
    params.o = view(o);
    aim(call.states[0], params.final_state, params.narrow_state);
    aim(call.states[1], params.final_momentum, params.narrow_momentum);
    forms_of<Real>(call).recurrent(params, parallel_executor());
  });
  for (std::size_t i = 0; i < states.size(); ++i) {
    if (!call.states[i].is_same(states[i])) states[i].copy_(call.states[i]);
  }
  return o;
}

Tensor recurrent_meta(const Call& call) {
  check(call);
  return at::empty_symint(call.v().sym_sizes(), call.v().options());
}

}  // namespace fastweights::detail
