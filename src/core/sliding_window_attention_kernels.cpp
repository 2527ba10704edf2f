#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "sliding_window_attention_kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <vector>

#include "fastweights/core/sliding_window_attention.hpp"
#include "sliding_window_attention-inl.hpp"
#include "sliding_window_attention_backward-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace {

using cpu::RotaryParams;

template <class Real>
void rotate_tokens(const RotaryParams& p, const Executor& executor) {
  const RotaryTable<Real> table(p.position, p.batch, p.tokens, p.size, p.base, executor);
  executor.run(p.batch, [&](std::int64_t batch) {
    std::vector<Real> row(static_cast<std::size_t>(p.size));
    for (std::int64_t i = 0; i < p.tokens * p.heads; ++i) {
      const auto offset = (batch * p.tokens * p.heads + i) * p.size;
      const auto angles = table.at(batch, i / p.heads);
      load_row(p.x.at(offset), p.x.dtype, p.size, row.data());
      p.inverse ? rotate_back(row.data(), angles, table.pairs())
                : rotate(row.data(), angles, table.pairs());
      store_row(row.data(), p.size, p.y.at(offset), p.y.dtype);
    }
  });
}

void rotary(const RotaryParams& p, const Executor& executor) {
  p.x.dtype == DType::kFloat64 ? rotate_tokens<double>(p, executor)
                               : rotate_tokens<float>(p, executor);
}

void attend(const AttentionParams& p, const Executor& executor) {
  p.query.dtype == DType::kFloat64 ? attention_forward<double>(p, executor)
                                   : attention_forward<float>(p, executor);
}

void attend_backward(const AttentionParams& p, const AttentionGradients& g,
                     const Executor& executor) {
  p.query.dtype == DType::kFloat64 ? attention_backward<double>(p, g, executor)
                                   : attention_backward<float>(p, g, executor);
}

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(rotary);
HWY_EXPORT(attend);
HWY_EXPORT(attend_backward);

}  // namespace fastweights::core

namespace fastweights::cpu {

void rotary_embedding(const RotaryParams& params, const Executor& executor) {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  HWY_DYNAMIC_DISPATCH(rotary)(params, executor);
}

void sliding_window_attention(const SlidingWindowAttentionParams& params,
                              const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(attend)(params, executor);
}

void sliding_window_attention_backward(const SlidingWindowAttentionParams& params,
                                       const SlidingWindowAttentionGradients& gradients,
                                       const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(attend_backward)(params, gradients, executor);
}

}  // namespace fastweights::cpu

#endif  // HWY_ONCE
