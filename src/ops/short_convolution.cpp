#include "fastweights/ops/short_convolution.hpp"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "fastweights/core/short_convolution.hpp"
#include "layer_checks.hpp"
#include "layer_op.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using detail::Tensors;

constexpr std::string_view kOp = "short_convolution";

void check(const Tensor& x, const Tensor& weight) {
  detail::check_dim(kOp, "x", x, "[B, T, D]", 3);
  detail::check_dim(kOp, "weight", weight, "[D, W]", 2);
  detail::check_floating(kOp, "x", x);
  detail::check_floating(kOp, "weight", weight);
  detail::check_that(weight.sym_size(1) > 0, kOp, "weight must have at least one tap");
  detail::check_shape(kOp, "weight", weight, "[D, W]", {x.sym_size(2), weight.sym_size(1)});
}

void check_state(const Tensor& x, const Tensor& weight, const Tensor& state) {
  detail::check_floating(kOp, "initial_state", state);
  detail::check_shape(kOp, "initial_state", state, "[B, W - 1, D]",
                      {x.sym_size(0), weight.sym_size(1) - 1, x.sym_size(2)});
}

// The last W - 1 rows of [state; x], copied, so that a state never keeps a long input alive.
Tensor next_state(const Tensor& x, const Tensor& state) {
  const auto kept = state.sym_size(1);
  const auto tokens = x.sym_size(1);
  if (tokens >= kept) {
    return x.narrow_symint(1, tokens - kept, kept).to(state.scalar_type(), false, /*copy=*/true);
  }
  return at::cat({state.narrow_symint(1, tokens, kept - tokens), x.to(state.scalar_type())}, 1);
}

// ---- the inner operator: y alone

// Parameters without y; the tensors must be contiguous and outlive them.
cpu::ShortConvolutionParams params_of(const Tensor& x, const Tensor& weight, const Tensor& state) {
  cpu::ShortConvolutionParams params;
  params.batch = x.size(0);
  params.tokens = x.size(1);
  params.channels = x.size(2);
  params.taps = weight.size(1);
  params.x = detail::const_array(x);
  params.weight = detail::const_array(weight);
  params.state = detail::const_array(state);
  return params;
}

Tensor convolve_cpu(const Tensor& x_in, const Tensor& weight_in, const Tensor& state_in) {
  const auto x = x_in.contiguous();
  const auto weight = weight_in.contiguous();
  const auto state = state_in.contiguous();
  auto y = detail::empty_as(x);
  auto params = params_of(x, weight, state);
  params.y = detail::array(y);
  cpu::short_convolution(params, detail::parallel_executor());
  return y;
}

Tensor convolve_meta(const Tensor& x, const Tensor&, const Tensor&) { return detail::empty_as(x); }

std::tuple<Tensor, Tensor, Tensor> convolve_backward_cpu(const Tensor& d_y_in, const Tensor& x_in,
                                                         const Tensor& weight_in,
                                                         const Tensor& state_in) {
  const auto d_y = d_y_in.contiguous();
  const auto x = x_in.contiguous();
  const auto weight = weight_in.contiguous();
  const auto state = state_in.contiguous();
  auto d_x = detail::empty_as(x);
  auto d_weight = detail::empty_as(weight);
  auto d_state = detail::empty_as(state);
  cpu::short_convolution_backward(params_of(x, weight, state),
                                  {detail::const_array(d_y), detail::array(d_x),
                                   detail::array(d_weight), detail::array(d_state)},
                                  detail::parallel_executor());
  return {d_x, d_weight, d_state};
}

std::tuple<Tensor, Tensor, Tensor> convolve_backward_meta(const Tensor&, const Tensor& x,
                                                          const Tensor& weight,
                                                          const Tensor& state) {
  return {detail::empty_as(x), detail::empty_as(weight), detail::empty_as(state)};
}

using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                             const Tensor&, const Tensor&);

Tensor convolve(const Tensor& x, const Tensor& weight, const Tensor& state) {
  static const auto op = detail::find_operator<Signature>("fastweights::_short_convolution");
  return op.call(x, weight, state);
}

Tensor convolve_autograd(const Tensor& x, const Tensor& weight, const Tensor& state) {
  const auto forward = [&] { return Tensors{convolve(x, weight, state)}; };
  return detail::record(
      "short_convolution", {x, weight, state}, forward,
      [](const Tensor& d_y, const Tensors& inputs, const Tensors&) {
        static const auto op =
            detail::find_operator<BackwardSignature>("fastweights::_short_convolution_backward");
        auto [d_x, d_weight, d_state] = op.call(d_y, inputs[0], inputs[1], inputs[2]);
        return Tensors{d_x, d_weight, d_state};
      })[0];
}

}  // namespace

std::tuple<Tensor, Tensor> short_convolution(const Tensor& x, const Tensor& weight,
                                             const std::optional<Tensor>& initial_state) {
  check(x, weight);
  const auto state =
      initial_state
          ? *initial_state
          : at::zeros_symint({x.sym_size(0), weight.sym_size(1) - 1, x.sym_size(2)}, x.options());
  check_state(x, weight, state);
  return {convolve(x, weight, state), next_state(x, state)};
}

}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "short_convolution(Tensor x, Tensor weight, Tensor? initial_state=None) "
      "-> (Tensor y, Tensor final_state)",
      &fastweights::short_convolution);
  m.def("_short_convolution(Tensor x, Tensor weight, Tensor state) -> Tensor");
  m.def(
      "_short_convolution_backward(Tensor d_y, Tensor x, Tensor weight, Tensor state) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("_short_convolution", fastweights::convolve_cpu);
  m.impl("_short_convolution_backward", fastweights::convolve_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastweights, Meta, m) {
  m.impl("_short_convolution", fastweights::convolve_meta);
  m.impl("_short_convolution_backward", fastweights::convolve_backward_meta);
}

TORCH_LIBRARY_IMPL(fastweights, Autograd, m) {
  m.impl("_short_convolution", fastweights::convolve_autograd);
  m.impl("_short_convolution_backward", torch::autograd::autogradNotImplementedFallback());
}
