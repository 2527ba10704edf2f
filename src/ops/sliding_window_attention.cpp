#include "fastweights/ops/sliding_window_attention.hpp"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "layer_checks.hpp"

namespace fastweights {
namespace {

constexpr std::string_view kOp = "sliding_window_attention";

using OptionalTensor = std::optional<at::Tensor>;
using SymInt = c10::SymInt;

// Cosine and sine [B, T, 1, D / 4] of every token's angles, formed in fp64.
struct Rotation {
  at::Tensor cosine, sine;
};

Rotation rotation(const at::Tensor& position, const SymInt& tokens, const SymInt& head_size,
                  double base, at::ScalarType type) {
  const auto fp64 = position.options().dtype(at::kDouble);
  const auto pairs = head_size / 4;
  const auto exponent = at::arange(pairs, fp64) / pairs;
  const auto frequency = at::pow(base, exponent.neg());
  const auto index = position.unsqueeze(1) + at::arange(tokens, position.options());
  const auto angle = index.to(at::kDouble).unsqueeze(-1) * frequency;
  return {angle.cos().to(type).unsqueeze(2), angle.sin().to(type).unsqueeze(2)};
}

// Rotates the first half of the last dimension of x [B, T, heads, D].
at::Tensor rotate(const at::Tensor& x, const Rotation& by) {
  const auto quarter = x.sym_size(-1) / 4;
  const auto a = x.narrow_symint(-1, 0, quarter);
  const auto b = x.narrow_symint(-1, quarter, quarter);
  const auto rest = x.narrow_symint(-1, quarter * 2, quarter * 2);
  return at::cat({(a * by.cosine - b * by.sine).to(x.scalar_type()),
                  (b * by.cosine + a * by.sine).to(x.scalar_type()), rest},
                 -1);
}

struct Cache {
  at::Tensor key, value;  // [B, window, heads, D]
};

// Index [B, count] of the ring slots of the tokens `first ... first + count - 1`, first [B].
at::Tensor slots(const at::Tensor& first, const SymInt& count, int64_t window) {
  return (first.unsqueeze(1) + at::arange(count, first.options())).remainder(window);
}

at::Tensor over_heads(const at::Tensor& index, const at::Tensor& like) {
  return index.unsqueeze(-1).unsqueeze(-1).expand_symint(
      {index.sym_size(0), index.sym_size(1), like.sym_size(2), like.sym_size(3)});
}

// The ring in the order of time: the `window` tokens before `position`.
at::Tensor unroll(const at::Tensor& ring, const at::Tensor& position, int64_t window) {
  return ring.gather(1, over_heads(slots(position, window, window), ring));
}

// The ring after the tokens x [B, T, heads, D], the first of which has index `position`.
at::Tensor roll_in(const at::Tensor& ring, const at::Tensor& x, const at::Tensor& position,
                   int64_t window, bool in_place) {
  const auto tokens = x.sym_size(1);
  const auto kept = tokens < window ? tokens : SymInt(window);
  const auto newest = x.narrow_symint(1, tokens - kept, kept).to(ring.scalar_type());
  const auto index = over_heads(slots(position + (tokens - kept), kept, window), ring);
  return in_place ? ring.scatter_(1, index, newest) : ring.scatter(1, index, newest);
}

// True where query i of a block may see key j of [window keys before the block, the block, sinks]:
// [block, window + block + sinks].
at::Tensor band(const SymInt& block, int64_t window, const SymInt& sinks, at::TensorOptions options) {
  const auto i = at::arange(block, options).unsqueeze(1);
  const auto j = at::arange(block + window, options);
  const auto near = (j > i).logical_and(j <= i + window);
  return at::cat({near, near.new_ones_symint({block, sinks})}, 1);
}

// band() for the first block, [B, 1, block, keys]: keys before the row's first token are hidden.
at::Tensor first_band(const at::Tensor& band, const at::Tensor& seen, int64_t window) {
  const auto age = at::arange(window, 0, -1, seen.options());
  const auto filled = age <= seen.unsqueeze(1);  // [B, window]
  const auto others = filled.new_ones_symint({filled.sym_size(0), band.sym_size(1) - window});
  return band.logical_and(at::cat({filled, others}, 1).unsqueeze(1)).unsqueeze(1);
}

// Queries [N, block, heads, D] against keys and values [N, keys, heads, D].
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& mask) {
  return at::scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                          mask)
      .transpose(1, 2);
}

// x [B, T, heads, D] -> [B, blocks + 1, window, heads, D] with `before` in front, zeros at the end.
at::Tensor in_blocks(const at::Tensor& before, const at::Tensor& x, int64_t window) {
  const auto missing = (SymInt(window) - x.sym_size(1) % window) % window;
  const auto end = x.new_zeros_symint({x.sym_size(0), missing, x.sym_size(2), x.sym_size(3)});
  const auto all = at::cat({before.to(x.scalar_type()), x, end}, 1);
  return all.unflatten_symint(1, {all.sym_size(1) / window, window});
}

at::Tensor sinks_of(const at::Tensor& sink, const SymInt& count) {
  return sink.transpose(0, 1).unsqueeze(0).expand_symint(
      {count, sink.sym_size(1), sink.sym_size(0), sink.sym_size(2)});
}

// At most `window` queries: one block.
at::Tensor attend_short(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const Cache& before, const Cache& sinks, const at::Tensor& seen,
                        int64_t window) {
  const auto batch = q.sym_size(0);
  const auto mask = band(q.sym_size(1), window, sinks.key.sym_size(1), seen.options());
  return attend(q, at::cat({before.key, k, sinks_of(sinks.key, batch)}, 1),
                at::cat({before.value, v, sinks_of(sinks.value, batch)}, 1),
                first_band(mask, seen, window));
}

// Blocks of `window` queries, each against the block before it and itself.
at::Tensor attend_long(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const Cache& before, const Cache& sinks, const at::Tensor& seen,
                       int64_t window) {
  const auto batch = q.sym_size(0);
  const auto keys = in_blocks(before.key, k, window);
  const auto values = in_blocks(before.value, v, window);
  const auto queries = in_blocks(q.narrow(1, 0, 0), q, window);
  const auto blocks = queries.sym_size(1);
  const auto pairs = [&](const at::Tensor& x, const at::Tensor& sink) {
    const auto previous = x.narrow_symint(1, 0, blocks).flatten(0, 1);
    const auto current = x.narrow_symint(1, 1, blocks).flatten(0, 1);
    return at::cat({previous, current, sinks_of(sink, batch * blocks)}, 1);
  };
  const auto mask = band(window, window, sinks.key.sym_size(1), seen.options());
  const auto first = first_band(mask, seen, window).unsqueeze(1);
  const auto rest = mask.expand_symint(
      {batch, blocks - 1, 1, mask.sym_size(0), mask.sym_size(1)});
  const auto o = attend(queries.flatten(0, 1), pairs(keys, sinks.key),
                        pairs(values, sinks.value), at::cat({first, rest}, 1).flatten(0, 1));
  return o.unflatten_symint(0, {batch, blocks}).flatten(1, 2).narrow_symint(1, 0, q.sym_size(1));
}

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
           const at::Tensor& sink_key, const at::Tensor& sink_value, const at::Tensor& position,
           const SlidingWindowAttentionParams& params) {
  detail::check_that(params.heads > 0 && params.window > 0, kOp,
                     "heads and window must be positive");
  detail::check_dim(kOp, "query", query, "[B, T, heads * D]", 3);
  detail::check_that(query.sym_size(2) % (params.heads * 4) == 0, kOp,
                     "the width of query must be a multiple of 4 * heads");
  const auto size = query.sym_size(2) / params.heads;
  detail::check_shape(kOp, "key", key, "[B, T, heads * D]", query.sym_sizes());
  detail::check_shape(kOp, "value", value, "[B, T, heads * D]", query.sym_sizes());
  detail::check_dim(kOp, "sink_key", sink_key, "[heads, S, D / 2]", 3);
  const auto sinks = sink_key.sym_size(1);
  detail::check_shape(kOp, "sink_key", sink_key, "[heads, S, D / 2]",
                      {params.heads, sinks, size / 2});
  detail::check_shape(kOp, "sink_value", sink_value, "[heads, S, D]", {params.heads, sinks, size});
  detail::check_shape(kOp, "position", position, "[B]", {query.sym_size(0)});
  detail::check_that(position.scalar_type() == at::kLong, kOp, "position must be int64");
}

Cache cache_or_empty(const OptionalTensor& key, const OptionalTensor& value,
                     const at::Tensor& like, const SlidingWindowAttentionParams& params) {
  const std::vector<SymInt> shape{like.sym_size(0), params.window, params.heads,
                                  like.sym_size(2) / params.heads};
  detail::check_that(key.has_value() == value.has_value(), kOp,
                     "cache_key and cache_value must be given together");
  if (!key.has_value()) {
    return {at::zeros_symint(shape, like.options()), at::zeros_symint(shape, like.options())};
  }
  detail::check_shape(kOp, "cache_key", *key, "[B, window, heads, D]", shape);
  detail::check_shape(kOp, "cache_value", *value, "[B, window, heads, D]", shape);
  return {*key, *value};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> sliding_window_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& sink_key, const at::Tensor& sink_value, const OptionalTensor& cache_key,
    const OptionalTensor& cache_value, const at::Tensor& position,
    const SlidingWindowAttentionParams& params) {
  check(query, key, value, sink_key, sink_value, position, params);
  const auto window = params.window;
  const auto cache = cache_or_empty(cache_key, cache_value, query, params);
  const auto split = [&](const at::Tensor& x) {
    return x.unflatten_symint(2, {params.heads, x.sym_size(2) / params.heads});
  };
  const auto tokens = query.sym_size(1);
  const auto v = split(value);
  const auto by = rotation(position, tokens, v.sym_size(3), params.rope_base,
                           v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto q = rotate(split(query), by);
  const auto k = rotate(split(key), by);

  const auto type = query.scalar_type();
  const Cache before{unroll(cache.key, position, window).to(type),
                     unroll(cache.value, position, window).to(type)};
  const Cache sinks{at::cat({at::zeros_like(sink_key), sink_key}, -1).to(type),
                    sink_value.to(type)};
  const auto seen = cache_key.has_value() ? position : at::zeros_like(position);
  const auto o = tokens <= window ? attend_short(q, k, v, before, sinks, seen, window)
                                  : attend_long(q, k, v, before, sinks, seen, window);
  return {o.flatten(2), roll_in(cache.key, k, position, window, params.in_place),
          roll_in(cache.value, v, position, window, params.in_place)};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> sliding_window_attention_op(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& sink_key, const at::Tensor& sink_value, const OptionalTensor& cache_key,
    const OptionalTensor& cache_value, const at::Tensor& position, int64_t heads, int64_t window,
    double rope_base, bool in_place) {
  return sliding_window_attention(query, key, value, sink_key, sink_value, cache_key, cache_value,
                                  position, {heads, window, rope_base, in_place});
}

}  // namespace
}  // namespace fastweights

TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def("sliding_window_attention(Tensor query, Tensor key, Tensor value, Tensor sink_key, "
        "Tensor sink_value, Tensor? cache_key, Tensor? cache_value, Tensor position, int heads, "
        "int window, float rope_base, bool in_place=False) "
        "-> (Tensor o, Tensor cache_key, Tensor cache_value)",
        &fastweights::sliding_window_attention_op);
}
