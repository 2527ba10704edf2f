#include "fastweights/ops/sliding_window_attention.hpp"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <vector>

#include "compute_type.hpp"
#include "fastweights/core/sliding_window_attention.hpp"
#include "layer_checks.hpp"
#include "layer_op.hpp"

namespace fastweights {
namespace {

using at::Tensor;
using c10::SymInt;
using detail::Tensors;
using OptionalTensor = std::optional<Tensor>;

constexpr std::string_view kOp = "sliding_window_attention";

Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// ---- rotary_embedding

void check_rotary(const Tensor& x, const Tensor& position, int64_t heads) {
  constexpr std::string_view kRotary = "rotary_embedding";
  detail::check_dim(kRotary, "x", x, "[B, T, heads * D]", 3);
  detail::check_floating(kRotary, "x", x);
  detail::check_that(heads > 0 && x.sym_size(2) % (heads * 4) == 0, kRotary,
                     "the width of x must be a multiple of 4 * heads");
  detail::check_shape(kRotary, "position", position, "[B]", {x.sym_size(0)});
  detail::check_that(position.scalar_type() == at::kLong, kRotary, "position must be int64");
}

Tensor rotary_cpu(const Tensor& x_in, const Tensor& position_in, int64_t heads, double base,
                  bool inverse) {
  check_rotary(x_in, position_in, heads);
  const auto x = x_in.contiguous();
  const auto position = position_in.contiguous();
  auto y = detail::empty_as(x);
  cpu::rotary_embedding(
      {x.size(0), x.size(1), heads, x.size(2) / heads, base, inverse,
       position.const_data_ptr<int64_t>(), detail::const_array(x), detail::array(y)},
      detail::parallel_executor());
  return y;
}

Tensor rotary_meta(const Tensor& x, const Tensor& position, int64_t heads, double, bool) {
  check_rotary(x, position, heads);
  return detail::empty_as(x);
}

using RotarySignature = Tensor(const Tensor&, const Tensor&, int64_t, double, bool);

Tensor call_rotary(const Tensor& x, const Tensor& position, int64_t heads, double base,
                   bool inverse) {
  static const auto op = detail::find_operator<RotarySignature>("fastweights::rotary_embedding");
  return op.call(x, position, heads, base, inverse);
}

// A rotation is linear and orthogonal: its gradient is rotated back.
Tensor rotary_autograd(const Tensor& x, const Tensor& position, int64_t heads, double base,
                       bool inverse) {
  const auto forward = [&] { return Tensors{call_rotary(x, position, heads, base, inverse)}; };
  return detail::record("rotary_embedding", {x, position}, forward,
                        [=](const Tensor& d_y, const Tensors& inputs, const Tensors&) {
                          return Tensors{call_rotary(d_y, inputs[1], heads, base, !inverse), {}};
                        })[0];
}

// ---- attention, without the update of the ring

// The tensors of a call; the caches are undefined if there are none.
struct Call {
  Tensor query, key, value, sink_key, sink_value, cache_key, cache_value, position;
  int64_t heads, window;
  double rope_base;

  Call contiguous() const {
    Call call = *this;
    for (auto* tensor : {&call.query, &call.key, &call.value, &call.sink_key, &call.sink_value,
                         &call.cache_key, &call.cache_value, &call.position}) {
      if (tensor->defined()) *tensor = tensor->contiguous();
    }
    return call;
  }
};

Call make_call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& sink_key,
               const Tensor& sink_value, const OptionalTensor& cache_key,
               const OptionalTensor& cache_value, const Tensor& position, int64_t heads,
               int64_t window, double rope_base) {
  return {query,
          key,
          value,
          sink_key,
          sink_value,
          or_undefined(cache_key),
          or_undefined(cache_value),
          position,
          heads,
          window,
          rope_base};
}

void check_types(const Call& call) {
  const auto check = [&](std::string_view name, const Tensor& tensor) {
    detail::check_floating(kOp, name, tensor);
    detail::check_that(tensor.scalar_type() == call.query.scalar_type(), kOp,
                       std::string(name) + " must have the type of query");
  };
  check("query", call.query);
  check("key", call.key);
  check("value", call.value);
  detail::check_floating(kOp, "sink_key", call.sink_key);
  detail::check_floating(kOp, "sink_value", call.sink_value);
  detail::check_that(call.position.scalar_type() == at::kLong, kOp, "position must be int64");
}

void check_cache(const Call& call) {
  const std::vector<SymInt> shape{call.query.sym_size(0), call.window, call.heads,
                                  call.query.sym_size(2) / call.heads};
  detail::check_that(call.cache_key.defined() == call.cache_value.defined(), kOp,
                     "cache_key and cache_value must be given together");
  if (!call.cache_key.defined()) return;
  detail::check_shape(kOp, "cache_key", call.cache_key, "[B, window, heads, D]", shape);
  detail::check_shape(kOp, "cache_value", call.cache_value, "[B, window, heads, D]", shape);
}

void check(const Call& call) {
  detail::check_that(call.heads > 0 && call.window > 0, kOp, "heads and window must be positive");
  const auto& query = call.query;
  detail::check_dim(kOp, "query", query, "[B, T, heads * D]", 3);
  detail::check_that(query.sym_size(2) % (call.heads * 4) == 0, kOp,
                     "the width of query must be a multiple of 4 * heads");
  const auto size = query.sym_size(2) / call.heads;
  detail::check_shape(kOp, "key", call.key, "[B, T, heads * D]", query.sym_sizes());
  detail::check_shape(kOp, "value", call.value, "[B, T, heads * D]", query.sym_sizes());
  detail::check_dim(kOp, "sink_key", call.sink_key, "[heads, S, D / 2]", 3);
  const auto sinks = call.sink_key.sym_size(1);
  detail::check_shape(kOp, "sink_key", call.sink_key, "[heads, S, D / 2]",
                      {call.heads, sinks, size / 2});
  detail::check_shape(kOp, "sink_value", call.sink_value, "[heads, S, D]",
                      {call.heads, sinks, size});
  detail::check_shape(kOp, "position", call.position, "[B]", {query.sym_size(0)});
  check_cache(call);
  check_types(call);
}

// Parameters without o and log_sum; `call` must be contiguous and outlive them.
cpu::SlidingWindowAttentionParams kernel_params(const Call& call) {
  cpu::SlidingWindowAttentionParams params;
  params.batch = call.query.size(0);
  params.tokens = call.query.size(1);
  params.heads = call.heads;
  params.size = call.query.size(2) / call.heads;
  params.sinks = call.sink_key.size(1);
  params.window = call.window;
  params.rope_base = call.rope_base;
  params.position = call.position.const_data_ptr<int64_t>();
  params.query = detail::const_array(call.query);
  params.key = detail::const_array(call.key);
  params.value = detail::const_array(call.value);
  params.sink_key = detail::const_array(call.sink_key);
  params.sink_value = detail::const_array(call.sink_value);
  params.cache_key = detail::const_array(call.cache_key);
  params.cache_value = detail::const_array(call.cache_value);
  return params;
}

// Starting threads costs more than a step of a few queries.
core::Executor executor_for(const cpu::SlidingWindowAttentionParams& params) {
  constexpr int64_t kFewScores = 1024;
  const auto scores = params.batch * params.heads * params.tokens * params.window;
  return scores <= kFewScores ? core::serial_executor() : detail::parallel_executor();
}

Tensor empty_log_sum(const Call& call) {
  return at::empty_symint({call.query.sym_size(0), call.heads, call.query.sym_size(1)},
                          call.query.options().dtype(detail::compute_type(call.query)));
}

std::tuple<Tensor, Tensor> attend_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const Tensor& sink_key, const Tensor& sink_value,
                                      const OptionalTensor& cache_key,
                                      const OptionalTensor& cache_value, const Tensor& position,
                                      int64_t heads, int64_t window, double rope_base) {
  const Call call = make_call(query, key, value, sink_key, sink_value, cache_key, cache_value,
                              position, heads, window, rope_base)
                        .contiguous();
  check(call);
  auto o = detail::empty_as(call.query);
  auto log_sum = empty_log_sum(call);
  auto params = kernel_params(call);
  params.o = detail::array(o);
  params.log_sum = detail::array(log_sum);
  cpu::sliding_window_attention(params, executor_for(params));
  return {o, log_sum};
}

std::tuple<Tensor, Tensor> attend_meta(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const Tensor& sink_key, const Tensor& sink_value,
                                       const OptionalTensor& cache_key,
                                       const OptionalTensor& cache_value, const Tensor& position,
                                       int64_t heads, int64_t window, double rope_base) {
  const Call call = make_call(query, key, value, sink_key, sink_value, cache_key, cache_value,
                              position, heads, window, rope_base);
  check(call);
  return {detail::empty_as(query), empty_log_sum(call)};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of query, key, value, the sinks and, if wanted, the caches (else empty tensors), not
// yet filled; slots of the caches that no query sees stay zero.
Gradients make_gradients(const Call& call, bool cache_gradients) {
  const auto cache = [&](const Tensor& ring) {
    return cache_gradients ? at::zeros_symint(ring.sym_sizes(), ring.options())
                           : at::empty({0}, call.query.options());
  };
  return {detail::empty_as(call.query),
          detail::empty_as(call.key),
          detail::empty_as(call.value),
          detail::empty_as(call.sink_key),
          detail::empty_as(call.sink_value),
          cache(call.cache_key),
          cache(call.cache_value)};
}

Gradients attend_backward_cpu(const Tensor& d_o, const Tensor& query, const Tensor& key,
                              const Tensor& value, const Tensor& sink_key, const Tensor& sink_value,
                              const OptionalTensor& cache_key, const OptionalTensor& cache_value,
                              const Tensor& position, const Tensor& log_sum, int64_t heads,
                              int64_t window, double rope_base, bool cache_gradients) {
  const Call call = make_call(query, key, value, sink_key, sink_value, cache_key, cache_value,
                              position, heads, window, rope_base)
                        .contiguous();
  const auto outer = d_o.contiguous();
  auto gradients = make_gradients(call, cache_gradients);
  const auto& [d_query, d_key, d_value, d_sink_key, d_sink_value, d_cache_key, d_cache_value] =
      gradients;
  auto params = kernel_params(call);
  params.log_sum = detail::array(log_sum);
  const auto no_array = core::Array{};
  cpu::sliding_window_attention_backward(
      params,
      {detail::const_array(outer), detail::array(d_query), detail::array(d_key),
       detail::array(d_value), detail::array(d_sink_key), detail::array(d_sink_value),
       cache_gradients ? detail::array(d_cache_key) : no_array,
       cache_gradients ? detail::array(d_cache_value) : no_array},
      detail::parallel_executor());
  return gradients;
}

Gradients attend_backward_meta(const Tensor&, const Tensor& query, const Tensor& key,
                               const Tensor& value, const Tensor& sink_key,
                               const Tensor& sink_value, const OptionalTensor& cache_key,
                               const OptionalTensor& cache_value, const Tensor& position,
                               const Tensor&, int64_t heads, int64_t window, double rope_base,
                               bool cache_gradients) {
  const Call call = make_call(query, key, value, sink_key, sink_value, cache_key, cache_value,
                              position, heads, window, rope_base);
  return make_gradients(call, cache_gradients);
}

using AttendSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                   const Tensor&, const Tensor&,
                                                   const OptionalTensor&, const OptionalTensor&,
                                                   const Tensor&, int64_t, int64_t, double);
using AttendBackwardSignature = Gradients(const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, const Tensor&, const Tensor&,
                                          const OptionalTensor&, const OptionalTensor&,
                                          const Tensor&, const Tensor&, int64_t, int64_t, double,
                                          bool);

std::tuple<Tensor, Tensor> call_attend(const Call& call) {
  static const auto op =
      detail::find_operator<AttendSignature>("fastweights::_sliding_window_attention");
  return op.call(call.query, call.key, call.value, call.sink_key, call.sink_value,
                 if_defined(call.cache_key), if_defined(call.cache_value), call.position,
                 call.heads, call.window, call.rope_base);
}

Tensors attend_gradients(const Tensor& d_o, const Tensors& inputs, const Tensor& log_sum,
                         int64_t heads, int64_t window, double rope_base, bool cache_gradients) {
  static const auto op = detail::find_operator<AttendBackwardSignature>(
      "fastweights::_sliding_window_attention_backward");
  auto [d_query, d_key, d_value, d_sink_key, d_sink_value, d_cache_key, d_cache_value] =
      op.call(d_o, inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], if_defined(inputs[5]),
              if_defined(inputs[6]), inputs[7], log_sum, heads, window, rope_base, cache_gradients);
  if (!cache_gradients) d_cache_key = d_cache_value = Tensor();
  return {d_query, d_key, d_value, d_sink_key, d_sink_value, d_cache_key, d_cache_value, {}};
}

std::tuple<Tensor, Tensor> attend_autograd(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& sink_key,
    const Tensor& sink_value, const OptionalTensor& cache_key, const OptionalTensor& cache_value,
    const Tensor& position, int64_t heads, int64_t window, double rope_base) {
  const Call call = make_call(query, key, value, sink_key, sink_value, cache_key, cache_value,
                              position, heads, window, rope_base);
  const bool cache_gradients = call.cache_key.defined() &&
                               (call.cache_key.requires_grad() || call.cache_value.requires_grad());
  const auto forward = [&] {
    auto [o, log_sum] = call_attend(call);
    return Tensors{o, log_sum};
  };
  const auto results = detail::record(
      kOp.data(),
      {query, key, value, sink_key, sink_value, call.cache_key, call.cache_value, position},
      forward, [=](const Tensor& d_o, const Tensors& inputs, const Tensors& kept) {
        return attend_gradients(d_o, inputs, kept[0], heads, window, rope_base, cache_gradients);
      });
  return {results[0], results[1]};
}

// ---- the ring

// Index [B * count] of rows of a [B * window, heads * D] ring: the slots of `count` tokens from
// `first`.
Tensor slots(const Tensor& first, const SymInt& count, int64_t window) {
  const auto options = first.options();
  const auto slot = (first.unsqueeze(1) + at::arange(count, options)).remainder(window);
  const auto row = at::arange(first.sym_size(0), options) * window;
  return (slot + row.unsqueeze(1)).flatten();
}

// The ring after the rows x [B, count, heads * D] of the tokens whose slots are `index`.
Tensor roll_in(const Tensor& ring, const Tensor& x, const Tensor& index, bool in_place) {
  const auto rows = x.to(ring.scalar_type()).flatten(0, 1);
  if (in_place) {
    ring.view_symint({-1, x.sym_size(2)}).index_copy_(0, index, rows);
    return ring;
  }
  return ring.reshape_symint({-1, x.sym_size(2)})
      .index_copy(0, index, rows)
      .view_symint(ring.sym_sizes());
}

}  // namespace

Tensor rotary_embedding(const Tensor& x, const Tensor& position, int64_t heads, double base) {
  return call_rotary(x, position, heads, base, false);
}

std::tuple<Tensor, Tensor, Tensor> sliding_window_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& sink_key,
    const Tensor& sink_value, const OptionalTensor& cache_key, const OptionalTensor& cache_value,
    const Tensor& position, const SlidingWindowAttentionParams& params) {
  const Call call = make_call(query, key, value, sink_key, sink_value, cache_key, cache_value,
                              position, params.heads, params.window, params.rope_base);
  check(call);
  const auto o = std::get<0>(call_attend(call));

  const auto tokens = query.sym_size(1);
  const auto kept = tokens < params.window ? tokens : SymInt(params.window);
  const auto first = position + (tokens - kept);
  const auto index = slots(first, kept, params.window);
  const auto newest_key = rotary_embedding(key.narrow_symint(1, tokens - kept, kept), first,
                                           params.heads, params.rope_base);
  const auto newest_value = value.narrow_symint(1, tokens - kept, kept);
  const auto ring = [&](const OptionalTensor& given) {
    return given ? *given
                 : at::zeros_symint({query.sym_size(0), params.window, params.heads,
                                     query.sym_size(2) / params.heads},
                                    query.options());
  };
  return {o, roll_in(ring(cache_key), newest_key, index, params.in_place),
          roll_in(ring(cache_value), newest_value, index, params.in_place)};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> sliding_window_attention_op(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& sink_key,
    const Tensor& sink_value, const OptionalTensor& cache_key, const OptionalTensor& cache_value,
    const Tensor& position, int64_t heads, int64_t window, double rope_base, bool in_place) {
  return sliding_window_attention(query, key, value, sink_key, sink_value, cache_key, cache_value,
                                  position, {heads, window, rope_base, in_place});
}

}  // namespace
}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "sliding_window_attention(Tensor query, Tensor key, Tensor value, Tensor sink_key, "
      "Tensor sink_value, Tensor? cache_key, Tensor? cache_value, Tensor position, int heads, "
      "int window, float rope_base, bool in_place=False) "
      "-> (Tensor o, Tensor cache_key, Tensor cache_value)",
      &fastweights::sliding_window_attention_op);
  m.def(
      "rotary_embedding(Tensor x, Tensor position, int heads, float base, bool inverse=False) "
      "-> Tensor");
  m.def(
      "_sliding_window_attention(Tensor query, Tensor key, Tensor value, Tensor sink_key, "
      "Tensor sink_value, Tensor? cache_key, Tensor? cache_value, Tensor position, int heads, "
      "int window, float rope_base) -> (Tensor o, Tensor log_sum)");
  m.def(
      "_sliding_window_attention_backward(Tensor d_o, Tensor query, Tensor key, Tensor value, "
      "Tensor sink_key, Tensor sink_value, Tensor? cache_key, Tensor? cache_value, "
      "Tensor position, Tensor log_sum, int heads, int window, float rope_base, "
      "bool cache_gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  m.impl("rotary_embedding", fastweights::rotary_cpu);
  m.impl("_sliding_window_attention", fastweights::attend_cpu);
  m.impl("_sliding_window_attention_backward", fastweights::attend_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastweights, Meta, m) {
  m.impl("rotary_embedding", fastweights::rotary_meta);
  m.impl("_sliding_window_attention", fastweights::attend_meta);
  m.impl("_sliding_window_attention_backward", fastweights::attend_backward_meta);
}

TORCH_LIBRARY_IMPL(fastweights, Autograd, m) {
  m.impl("rotary_embedding", fastweights::rotary_autograd);
  m.impl("_sliding_window_attention", fastweights::attend_autograd);
  m.impl("_sliding_window_attention_backward", torch::autograd::autogradNotImplementedFallback());
}
