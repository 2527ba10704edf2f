#include "fastweights/ops/normalization.hpp"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "fastweights/core/normalization.hpp"
#include "layer_checks.hpp"
#include "layer_op.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using OptionalType = std::optional<at::ScalarType>;

// ---- rms_norm

void check_norm(std::string_view op, const Tensor& x, const Tensor& weight) {
  detail::check_that(x.dim() > 0, op, "x must be [..., D], got a scalar");
  detail::check_floating(op, "x", x);
  detail::check_floating(op, "weight", weight);
  detail::check_shape(op, "weight", weight, "[D]", {x.sym_size(-1)});
}

// Parameters without y; the tensors must be contiguous and outlive them.
cpu::RmsNormParams norm_params(const Tensor& x, const Tensor& weight, double eps) {
  cpu::RmsNormParams params;
  params.size = x.size(-1);
  params.rows = params.size == 0 ? 0 : x.numel() / params.size;
  params.eps = eps;
  params.x = detail::const_array(x);
  params.weight = detail::const_array(weight);
  return params;
}

Tensor rms_norm_cpu(const Tensor& x_in, const Tensor& weight_in, double eps, OptionalType dtype) {
  check_norm("rms_norm", x_in, weight_in);
  const auto x = x_in.contiguous();
  const auto weight = weight_in.contiguous();
  auto y = detail::empty_as(x, dtype);
  auto params = norm_params(x, weight, eps);
  params.y = detail::array(y);
  cpu::rms_norm(params, detail::parallel_executor());
  return y;
}

Tensor rms_norm_meta(const Tensor& x, const Tensor& weight, double, OptionalType dtype) {
  check_norm("rms_norm", x, weight);
  return detail::empty_as(x, dtype);
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& d_y_in, const Tensor& x_in,
                                                 const Tensor& weight_in, double eps) {
  const auto d_y = d_y_in.contiguous();
  const auto x = x_in.contiguous();
  const auto weight = weight_in.contiguous();
  auto d_x = detail::empty_as(x);
  auto d_weight = detail::empty_as(weight);
  cpu::RmsNormGradients gradients;
  gradients.d_y = detail::const_array(d_y);
  gradients.d_x = detail::array(d_x);
  gradients.d_weight = detail::array(d_weight);
  cpu::rms_norm_backward(norm_params(x, weight, eps), gradients, detail::parallel_executor());
  return {d_x, d_weight};
}

std::tuple<Tensor, Tensor> rms_norm_backward_meta(const Tensor&, const Tensor& x,
                                                  const Tensor& weight, double) {
  return {detail::empty_as(x), detail::empty_as(weight)};
}

using NormSignature = Tensor(const Tensor&, const Tensor&, double, OptionalType);
using NormBackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&,
                                                         const Tensor&, double);

Tensor call_rms_norm(const Tensor& x, const Tensor& weight, double eps, OptionalType dtype) {
  static const auto op = detail::find_operator<NormSignature>("fastweights::rms_norm");
  return op.call(x, weight, eps, dtype);
}

Tensor rms_norm_autograd(const Tensor& x, const Tensor& weight, double eps, OptionalType dtype) {
  const auto forward = [&] { return detail::Tensors{call_rms_norm(x, weight, eps, dtype)}; };
  return detail::record(
      "rms_norm", {x, weight}, forward, [eps](const Tensor& d_y, const auto& inputs, const auto&) {
        static const auto op =
            detail::find_operator<NormBackwardSignature>("fastweights::rms_norm_backward");
        auto [d_x, d_weight] = op.call(d_y, inputs[0], inputs[1], eps);
        return detail::Tensors{d_x, d_weight};
      })[0];
}

Tensor rms_norm_autocast(const Tensor& x, const Tensor& weight, double eps, OptionalType dtype) {
  const auto device = x.device().type();
  const c10::impl::ExcludeDispatchKeyGuard guard(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto lower = at::autocast::get_autocast_dtype(device);
  const bool wide = x.scalar_type() == at::kDouble;
  return call_rms_norm(x, weight, eps, dtype || wide ? dtype : OptionalType(lower));
}

// ---- gated_rms_norm

void check_gated(const Tensor& x, const Tensor& gate, const Tensor& weight) {
  check_norm("gated_rms_norm", x, weight);
  detail::check_floating("gated_rms_norm", "gate", gate);
  detail::check_shape("gated_rms_norm", "gate", gate, "the shape of x", x.sym_sizes());
}

Tensor gated_rms_norm_cpu(const Tensor& x_in, const Tensor& gate_in, const Tensor& weight_in,
                          double eps) {
  check_gated(x_in, gate_in, weight_in);
  const auto x = x_in.contiguous();
  const auto gate = gate_in.contiguous();
  const auto weight = weight_in.contiguous();
  auto y = detail::empty_as(x);
  auto params = norm_params(x, weight, eps);
  params.gate = detail::const_array(gate);
  params.y = detail::array(y);
  cpu::rms_norm(params, detail::parallel_executor());
  return y;
}

Tensor gated_rms_norm_meta(const Tensor& x, const Tensor& gate, const Tensor& weight, double) {
  check_gated(x, gate, weight);
  return detail::empty_as(x);
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward_cpu(const Tensor& d_y_in,
                                                               const Tensor& x_in,
                                                               const Tensor& gate_in,
                                                               const Tensor& weight_in,
                                                               double eps) {
  const auto d_y = d_y_in.contiguous();
  const auto x = x_in.contiguous();
  const auto gate = gate_in.contiguous();
  const auto weight = weight_in.contiguous();
  auto d_x = detail::empty_as(x);
  auto d_gate = detail::empty_as(gate);
  auto d_weight = detail::empty_as(weight);
  auto params = norm_params(x, weight, eps);
  params.gate = detail::const_array(gate);
  cpu::rms_norm_backward(params,
                         {detail::const_array(d_y), detail::array(d_x), detail::array(d_weight),
                          detail::array(d_gate)},
                         detail::parallel_executor());
  return {d_x, d_gate, d_weight};
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward_meta(const Tensor&, const Tensor& x,
                                                                const Tensor& gate,
                                                                const Tensor& weight, double) {
  return {detail::empty_as(x), detail::empty_as(gate), detail::empty_as(weight)};
}

using GatedSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, double);
using GatedBackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                  const Tensor&, const Tensor&,
                                                                  double);

Tensor call_gated_rms_norm(const Tensor& x, const Tensor& gate, const Tensor& weight, double eps) {
  static const auto op = detail::find_operator<GatedSignature>("fastweights::gated_rms_norm");
  return op.call(x, gate, weight, eps);
}

Tensor gated_rms_norm_autograd(const Tensor& x, const Tensor& gate, const Tensor& weight,
                               double eps) {
  const auto forward = [&] { return detail::Tensors{call_gated_rms_norm(x, gate, weight, eps)}; };
  return detail::record(
      "gated_rms_norm", {x, gate, weight}, forward,
      [eps](const Tensor& d_y, const auto& inputs, const auto&) {
        static const auto op =
            detail::find_operator<GatedBackwardSignature>("fastweights::gated_rms_norm_backward");
        auto [d_x, d_gate, d_weight] = op.call(d_y, inputs[0], inputs[1], inputs[2], eps);
        return detail::Tensors{d_x, d_gate, d_weight};
      })[0];
}

// ---- swiglu

void check_swiglu(const Tensor& gate, const Tensor& up) {
  detail::check_floating("swiglu", "gate", gate);
  detail::check_floating("swiglu", "up", up);
  detail::check_shape("swiglu", "up", up, "the shape of gate", gate.sym_sizes());
}

Tensor swiglu_cpu(const Tensor& gate_in, const Tensor& up_in) {
  check_swiglu(gate_in, up_in);
  const auto gate = gate_in.contiguous();
  const auto up = up_in.contiguous();
  auto y = detail::empty_as(gate);
  cpu::swiglu({gate.numel(), detail::const_array(gate), detail::const_array(up), detail::array(y)},
              detail::parallel_executor());
  return y;
}

Tensor swiglu_meta(const Tensor& gate, const Tensor& up) {
  check_swiglu(gate, up);
  return detail::empty_as(gate);
}

std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& d_y_in, const Tensor& gate_in,
                                               const Tensor& up_in) {
  const auto d_y = d_y_in.contiguous();
  const auto gate = gate_in.contiguous();
  const auto up = up_in.contiguous();
  auto d_gate = detail::empty_as(gate);
  auto d_up = detail::empty_as(up);
  cpu::swiglu_backward({gate.numel(), detail::const_array(gate), detail::const_array(up), {}},
                       {detail::const_array(d_y), detail::array(d_gate), detail::array(d_up)},
                       detail::parallel_executor());
  return {d_gate, d_up};
}

std::tuple<Tensor, Tensor> swiglu_backward_meta(const Tensor&, const Tensor& gate,
                                                const Tensor& up) {
  return {detail::empty_as(gate), detail::empty_as(up)};
}

using SwigluSignature = Tensor(const Tensor&, const Tensor&);
using SwigluBackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&,
                                                           const Tensor&);

Tensor call_swiglu(const Tensor& gate, const Tensor& up) {
  static const auto op = detail::find_operator<SwigluSignature>("fastweights::swiglu");
  return op.call(gate, up);
}

Tensor swiglu_autograd(const Tensor& gate, const Tensor& up) {
  const auto forward = [&] { return detail::Tensors{call_swiglu(gate, up)}; };
  return detail::record(
      "swiglu", {gate, up}, forward, [](const Tensor& d_y, const auto& inputs, const auto&) {
        static const auto op =
            detail::find_operator<SwigluBackwardSignature>("fastweights::swiglu_backward");
        auto [d_gate, d_up] = op.call(d_y, inputs[0], inputs[1]);
        return detail::Tensors{d_gate, d_up};
      })[0];
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, OptionalType dtype) {
  return call_rms_norm(x, weight, eps, dtype);
}

Tensor gated_rms_norm(const Tensor& x, const Tensor& gate, const Tensor& weight, double eps) {
  return call_gated_rms_norm(x, gate, weight, eps);
}

Tensor swiglu(const Tensor& gate, const Tensor& up) { return call_swiglu(gate, up); }

}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, ScalarType? dtype=None) -> Tensor");
  m.def("rms_norm_backward(Tensor d_y, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor");
  m.def(
      "gated_rms_norm_backward(Tensor d_y, Tensor x, Tensor gate, Tensor weight, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor d_y, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("rms_norm", fastweights::rms_norm_cpu);
  m.impl("rms_norm_backward", fastweights::rms_norm_backward_cpu);
  m.impl("gated_rms_norm", fastweights::gated_rms_norm_cpu);
  m.impl("gated_rms_norm_backward", fastweights::gated_rms_norm_backward_cpu);
  m.impl("swiglu", fastweights::swiglu_cpu);
  m.impl("swiglu_backward", fastweights::swiglu_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastweights, Meta, m) {
  m.impl("rms_norm", fastweights::rms_norm_meta);
  m.impl("rms_norm_backward", fastweights::rms_norm_backward_meta);
  m.impl("gated_rms_norm", fastweights::gated_rms_norm_meta);
  m.impl("gated_rms_norm_backward", fastweights::gated_rms_norm_backward_meta);
  m.impl("swiglu", fastweights::swiglu_meta);
  m.impl("swiglu_backward", fastweights::swiglu_backward_meta);
}

TORCH_LIBRARY_IMPL(fastweights, Autograd, m) {
  m.impl("rms_norm", fastweights::rms_norm_autograd);
  m.impl("rms_norm_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gated_rms_norm", fastweights::gated_rms_norm_autograd);
  m.impl("gated_rms_norm_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("swiglu", fastweights::swiglu_autograd);
  m.impl("swiglu_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(fastweights, AutocastCPU, m) {
  m.impl("rms_norm", fastweights::rms_norm_autocast);
}

TORCH_LIBRARY_IMPL(fastweights, AutocastCUDA, m) {
  m.impl("rms_norm", fastweights::rms_norm_autocast);
}
