#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "normalization_kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cmath>
#include <vector>

#include "activation-inl.hpp"
#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/normalization.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace {

using cpu::RmsNormGradients;
using cpu::RmsNormParams;
using cpu::SwigluGradients;
using cpu::SwigluParams;

/// Elements of one task: enough to outweigh its start, fixed so that sums are always cut alike.
constexpr std::int64_t kTaskElements = 16384;

std::int64_t rows_per_task(std::int64_t size) {
  return std::max<std::int64_t>(1, kTaskElements / std::max<std::int64_t>(size, 1));
}

std::int64_t divide_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

template <class Real>
Real inverse_rms(const Real* x, std::int64_t size, double eps) {
  const Real mean = dot(x, x, size) / static_cast<Real>(size);
  return Real{1} / std::sqrt(mean + static_cast<Real>(eps));
}

template <class Real>
void norm_row(const Real* x, const Real* weight, const Real* gate, Real scale, std::int64_t size,
              Real* y) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto factor = hn::Set(d, scale);
  for (std::int64_t i = 0; i < size; i += lanes) {
    auto value = hn::Mul(hn::Mul(hn::LoadU(d, x + i), factor), hn::LoadU(d, weight + i));
    if (gate != nullptr) {
      const auto z = hn::LoadU(d, gate + i);
      value = hn::Mul(value, hn::Mul(z, sigmoid(d, z)));
    }
    hn::StoreU(value, d, y + i);
  }
}

template <class Real>
void norm_rows(const RmsNormParams& p, std::int64_t begin, std::int64_t end) {
  const auto width = padded<Real>(p.size);
  AlignedBuffer<Real> buffer(static_cast<std::size_t>(4 * width));
  Real* scratch = buffer.data();
  const Real* weight = read_row(p.weight.data, p.weight.dtype, p.size, scratch);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto first = row * p.size;
    const Real* x = read_row(p.x.at(first), p.x.dtype, p.size, scratch + width);
    const Real* gate =
        p.gate ? read_row(p.gate.at(first), p.gate.dtype, p.size, scratch + 2 * width) : nullptr;
    Real* y = begin_row(p.y.at(first), p.y.dtype, p.size, scratch + 3 * width);
    norm_row(x, weight, gate, inverse_rms(x, p.size, p.eps), width, y);
    finish_row(y, p.size, p.y.at(first), p.y.dtype);
  }
}

template <class Real>
void rms_norm(const RmsNormParams& p, const Executor& executor) {
  const auto per_task = rows_per_task(p.size);
  executor.run(divide_up(p.rows, per_task), [&](std::int64_t task) {
    norm_rows<Real>(p, task * per_task, std::min(p.rows, (task + 1) * per_task));
  });
}

/// One row of the backward pass, as whole vectors of `Real`.
template <class Real>
struct NormGradientRow {
  const Real* d_y;
  const Real* x;
  const Real* gate;  // or null
  Real* d_x;
  Real* d_gate;  // or null
};

/// Leaves weight ⊙ d(norm) in d_x, fills d_gate and adds to d_weight; returns Σ (weight ⊙ d) · x̂.
template <class Real>
Real gradient_sums(const NormGradientRow<Real>& row, const Real* weight, Real scale,
                   std::int64_t size, Real* d_weight) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto factor = hn::Set(d, scale);
  auto sum = hn::Zero(d);
  for (std::int64_t i = 0; i < size; i += lanes) {
    const auto normed = hn::Mul(hn::LoadU(d, row.x + i), factor);
    const auto w = hn::LoadU(d, weight + i);
    auto d_norm = hn::LoadU(d, row.d_y + i);
    if (row.gate != nullptr) {
      const auto z = hn::LoadU(d, row.gate + i);
      const auto s = sigmoid(d, z);
      const auto outer = hn::Mul(d_norm, hn::Mul(normed, w));
      hn::StoreU(hn::Mul(outer, silu_slope(d, z, s)), d, row.d_gate + i);
      d_norm = hn::Mul(d_norm, hn::Mul(z, s));
    }
    hn::StoreU(hn::MulAdd(d_norm, normed, hn::LoadU(d, d_weight + i)), d, d_weight + i);
    const auto inner = hn::Mul(d_norm, w);
    sum = hn::MulAdd(inner, normed, sum);
    hn::StoreU(inner, d, row.d_x + i);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

/// d_x ← scale · (d_x − x̂ · mean).
template <class Real>
void finish_gradient(const Real* x, Real scale, Real mean, std::int64_t size, Real* d_x) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto factor = hn::Set(d, scale);
  const auto slope = hn::Set(d, scale * mean);
  for (std::int64_t i = 0; i < size; i += lanes) {
    const auto inner = hn::NegMulAdd(slope, hn::LoadU(d, x + i), hn::LoadU(d, d_x + i));
    hn::StoreU(hn::Mul(factor, inner), d, d_x + i);
  }
}

template <class Real>
void norm_gradient_rows(const RmsNormParams& p, const RmsNormGradients& g, std::int64_t begin,
                        std::int64_t end, Real* d_weight) {
  const auto width = padded<Real>(p.size);
  AlignedBuffer<Real> buffer(static_cast<std::size_t>(6 * width));
  Real* scratch = buffer.data();
  const Real* weight = read_row(p.weight.data, p.weight.dtype, p.size, scratch);
  for (std::int64_t i = begin; i < end; ++i) {
    const auto first = i * p.size;
    NormGradientRow<Real> row{};
    row.d_y = read_row(g.d_y.at(first), g.d_y.dtype, p.size, scratch + width);
    row.x = read_row(p.x.at(first), p.x.dtype, p.size, scratch + 2 * width);
    row.d_x = begin_row(g.d_x.at(first), g.d_x.dtype, p.size, scratch + 3 * width);
    if (p.gate) {
      row.gate = read_row(p.gate.at(first), p.gate.dtype, p.size, scratch + 4 * width);
      row.d_gate = begin_row(g.d_gate.at(first), g.d_gate.dtype, p.size, scratch + 5 * width);
    }
    const Real scale = inverse_rms(row.x, p.size, p.eps);
    const Real sum = gradient_sums(row, weight, scale, width, d_weight);
    finish_gradient(row.x, scale, sum / static_cast<Real>(p.size), width, row.d_x);
    finish_row(row.d_x, p.size, g.d_x.at(first), g.d_x.dtype);
    if (p.gate) finish_row(row.d_gate, p.size, g.d_gate.at(first), g.d_gate.dtype);
  }
}

template <class Real>
void rms_norm_backward(const RmsNormParams& p, const RmsNormGradients& g,
                       const Executor& executor) {
  const auto width = padded<Real>(p.size);
  const auto per_task = rows_per_task(p.size);
  const auto tasks = divide_up(p.rows, per_task);
  std::vector<Real> partial(static_cast<std::size_t>(tasks * width), Real{0});
  executor.run(tasks, [&](std::int64_t task) {
    norm_gradient_rows<Real>(p, g, task * per_task, std::min(p.rows, (task + 1) * per_task),
                             partial.data() + task * width);
  });
  std::vector<Real> total(static_cast<std::size_t>(width), Real{0});
  for (std::int64_t task = 0; task < tasks; ++task) {
    add_scaled_row(partial.data() + task * width, Real{1}, width, total.data());
  }
  store_row(total.data(), p.size, g.d_weight.data, g.d_weight.dtype);
}

/// Elements that SwiGLU takes at a time; a few rows of them stay in L1.
constexpr std::int64_t kSwigluRow = 512;

template <class Real>
void swiglu_piece(const SwigluParams& p, std::int64_t first, std::int64_t size) {
  HWY_ALIGN Real scratch[3][kSwigluRow];
  const Real* gate = read_row(p.gate.at(first), p.gate.dtype, size, scratch[0]);
  const Real* up = read_row(p.up.at(first), p.up.dtype, size, scratch[1]);
  Real* y = begin_row(p.y.at(first), p.y.dtype, size, scratch[2]);
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < size; i += lanes) {
    const auto z = hn::LoadU(d, gate + i);
    hn::StoreU(hn::Mul(hn::Mul(z, sigmoid(d, z)), hn::LoadU(d, up + i)), d, y + i);
  }
  finish_row(y, size, p.y.at(first), p.y.dtype);
}

template <class Real>
void swiglu_gradient_piece(const SwigluParams& p, const SwigluGradients& g, std::int64_t first,
                           std::int64_t size) {
  HWY_ALIGN Real scratch[5][kSwigluRow];
  const Real* gate = read_row(p.gate.at(first), p.gate.dtype, size, scratch[0]);
  const Real* up = read_row(p.up.at(first), p.up.dtype, size, scratch[1]);
  const Real* d_y = read_row(g.d_y.at(first), g.d_y.dtype, size, scratch[2]);
  Real* d_gate = begin_row(g.d_gate.at(first), g.d_gate.dtype, size, scratch[3]);
  Real* d_up = begin_row(g.d_up.at(first), g.d_up.dtype, size, scratch[4]);
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < size; i += lanes) {
    const auto z = hn::LoadU(d, gate + i);
    const auto s = sigmoid(d, z);
    const auto outer = hn::LoadU(d, d_y + i);
    hn::StoreU(hn::Mul(outer, hn::Mul(z, s)), d, d_up + i);
    const auto inner = hn::Mul(outer, hn::LoadU(d, up + i));
    hn::StoreU(hn::Mul(inner, silu_slope(d, z, s)), d, d_gate + i);
  }
  finish_row(d_gate, size, g.d_gate.at(first), g.d_gate.dtype);
  finish_row(d_up, size, g.d_up.at(first), g.d_up.dtype);
}

template <class Piece>
void for_each_piece(std::int64_t count, const Executor& executor, const Piece& piece) {
  executor.run(divide_up(count, kTaskElements), [&](std::int64_t task) {
    const auto end = std::min(count, (task + 1) * kTaskElements);
    for (auto first = task * kTaskElements; first < end; first += kSwigluRow) {
      piece(first, std::min(kSwigluRow, end - first));
    }
  });
}

template <class Real>
void swiglu(const SwigluParams& p, const Executor& executor) {
  for_each_piece(p.count, executor, [&](std::int64_t first, std::int64_t size) {
    swiglu_piece<Real>(p, first, size);
  });
}

template <class Real>
void swiglu_backward(const SwigluParams& p, const SwigluGradients& g, const Executor& executor) {
  for_each_piece(p.count, executor, [&](std::int64_t first, std::int64_t size) {
    swiglu_gradient_piece<Real>(p, g, first, size);
  });
}

bool is_double(const ConstArray& array) { return array.dtype == DType::kFloat64; }

void rms_norm_any(const RmsNormParams& p, const Executor& executor) {
  is_double(p.x) ? rms_norm<double>(p, executor) : rms_norm<float>(p, executor);
}

void rms_norm_backward_any(const RmsNormParams& p, const RmsNormGradients& g,
                           const Executor& executor) {
  is_double(p.x) ? rms_norm_backward<double>(p, g, executor)
                 : rms_norm_backward<float>(p, g, executor);
}

void swiglu_any(const SwigluParams& p, const Executor& executor) {
  is_double(p.gate) ? swiglu<double>(p, executor) : swiglu<float>(p, executor);
}

void swiglu_backward_any(const SwigluParams& p, const SwigluGradients& g,
                         const Executor& executor) {
  is_double(p.gate) ? swiglu_backward<double>(p, g, executor)
                    : swiglu_backward<float>(p, g, executor);
}

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(rms_norm_any);
HWY_EXPORT(rms_norm_backward_any);
HWY_EXPORT(swiglu_any);
HWY_EXPORT(swiglu_backward_any);

}  // namespace fastweights::core

namespace fastweights::cpu {

void rms_norm(const RmsNormParams& params, const Executor& executor) {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  HWY_DYNAMIC_DISPATCH(rms_norm_any)(params, executor);
}

void rms_norm_backward(const RmsNormParams& params, const RmsNormGradients& gradients,
                       const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(rms_norm_backward_any)(params, gradients, executor);
}

void swiglu(const SwigluParams& params, const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(swiglu_any)(params, executor);
}

void swiglu_backward(const SwigluParams& params, const SwigluGradients& gradients,
                     const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(swiglu_backward_any)(params, gradients, executor);
}

}  // namespace fastweights::cpu

#endif  // HWY_ONCE
