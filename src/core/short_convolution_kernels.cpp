// Sets that would add code but no speed here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "short_convolution_kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <vector>

#include "activation-inl.hpp"
#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/short_convolution.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace {

using cpu::ShortConvolutionGradients;
using cpu::ShortConvolutionParams;

// A task walks through time with a tile of kTokens tokens × kChannels channels in L1.
constexpr std::int64_t kChannels = 64;
constexpr std::int64_t kTokens = 32;

/// One batch row and block of channels.
template <class Real>
class Lane {
 public:
  Lane(const ShortConvolutionParams& params, std::int64_t batch, std::int64_t block)
      : p_(params),
        batch_(batch),
        first_(block * kChannels),
        count_(std::min(kChannels, params.channels - first_)),
        weight_(static_cast<std::size_t>(params.taps * kChannels)),
        inputs_(static_cast<std::size_t>((params.taps - 1 + kTokens) * kChannels)) {
    load_weight();
  }

  std::int64_t count() const { return count_; }
  const Real* weight(std::int64_t tap) const { return weight_.data() + tap * kChannels; }

  /// Row `t` of the tile's inputs; −(taps − 1) is the first.
  Real* input(std::int64_t t) { return inputs_.data() + (t + p_.taps - 1) * kChannels; }

  /// Offset of this block in row `t` of [batch, tokens, channels], and in row `t` of the state.
  std::int64_t offset(std::int64_t t) const {
    return (batch_ * p_.tokens + t) * p_.channels + first_;
  }
  std::int64_t state_offset(std::int64_t t) const {
    return (batch_ * (p_.taps - 1) + t) * p_.channels + first_;
  }

  /// Fills the inputs of the tokens `begin … begin + tokens − 1` and of the taps − 1 before them.
  void load(std::int64_t begin, std::int64_t tokens) {
    const auto past = p_.taps - 1;
    for (std::int64_t t = -past; t < tokens; ++t) {
      const auto time = begin + t;
      const auto& from = time < 0 ? p_.state : p_.x;
      load_block(from.at(time < 0 ? state_offset(time + past) : offset(time)), from.dtype,
                 input(t));
    }
  }

  void load_block(const void* row, DType dtype, Real* out) const {
    load_row(row, dtype, count_, out);
    std::fill(out + count_, out + kChannels, Real{0});
  }

 private:
  // [channels, taps] → [taps, channels].
  void load_weight() {
    std::fill_n(weight_.data(), weight_.size(), Real{0});
    for (std::int64_t c = 0; c < count_; ++c) {
      for (std::int64_t tap = 0; tap < p_.taps; ++tap) {
        const auto index = (first_ + c) * p_.taps + tap;
        weight_.data()[tap * kChannels + c] =
            load_scalar<Real>(p_.weight.at(index), p_.weight.dtype);
      }
    }
  }

  const ShortConvolutionParams& p_;
  std::int64_t batch_, first_, count_;
  AlignedBuffer<Real> weight_;
  AlignedBuffer<Real> inputs_;
};

/// The convolution before its activation, for one vector of channels.
template <class D, class Real>
HWY_INLINE hn::Vec<D> convolve(D d, const Real* inputs, const Real* weight, std::int64_t taps) {
  auto sum = hn::Mul(hn::Load(d, inputs), hn::Load(d, weight));
  for (std::int64_t tap = 1; tap < taps; ++tap) {
    sum = hn::MulAdd(hn::Load(d, inputs + tap * kChannels), hn::Load(d, weight + tap * kChannels),
                     sum);
  }
  return sum;
}

template <class Real>
void convolve_lane(const ShortConvolutionParams& p, std::int64_t batch, std::int64_t block) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  Lane<Real> lane(p, batch, block);
  HWY_ALIGN Real out[kChannels];
  for (std::int64_t begin = 0; begin < p.tokens; begin += kTokens) {
    const auto tokens = std::min(kTokens, p.tokens - begin);
    lane.load(begin, tokens);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const Real* inputs = lane.input(t - p.taps + 1);
      for (std::int64_t c = 0; c < kChannels; c += lanes) {
        const auto sum = convolve(d, inputs + c, lane.weight(0) + c, p.taps);
        hn::Store(hn::Mul(sum, sigmoid(d, sum)), d, out + c);
      }
      store_row(out, lane.count(), p.y.at(lane.offset(begin + t)), p.y.dtype);
    }
  }
}

/// Gradients of one batch row and block of channels. With a = convolution before the activation,
/// d_x_t = Σ_w weight_w ⊙ d_a_{t + W − 1 − w}; d_a of the last W − 1 tokens is carried from tile to
/// tile, and x before the first token is the state.
template <class Real>
class GradientLane {
 public:
  GradientLane(const ShortConvolutionParams& params, const ShortConvolutionGradients& gradients,
               std::int64_t batch, std::int64_t block, Real* d_weight)
      : p_(params),
        g_(gradients),
        lane_(params, batch, block),
        past_(params.taps - 1),
        d_sums_(static_cast<std::size_t>((past_ + std::max(kTokens, past_)) * kChannels)),
        d_weight_(d_weight) {}

  void run() {
    std::fill_n(d_sums_.data(), past_ * kChannels, Real{0});
    for (std::int64_t begin = 0; begin < p_.tokens; begin += kTokens) {
      const auto tokens = std::min(kTokens, p_.tokens - begin);
      lane_.load(begin, tokens);
      for (std::int64_t t = 0; t < tokens; ++t) add_token(begin + t, t);
      store_inputs(begin - past_, tokens);
      std::copy_n(d_sum(tokens - past_), past_ * kChannels, d_sum(-past_));
    }
    std::fill_n(d_sum(0), past_ * kChannels, Real{0});
    store_inputs(p_.tokens - past_, past_);
  }

 private:
  /// Row `t` of the tile's d_a; −past is the first.
  Real* d_sum(std::int64_t t) { return d_sums_.data() + (t + past_) * kChannels; }

  /// Forms d_a of a token, adds its part of d_weight.
  void add_token(std::int64_t time, std::int64_t t) {
    const hn::ScalableTag<Real> d;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    HWY_ALIGN Real d_y[kChannels];
    lane_.load_block(g_.d_y.at(lane_.offset(time)), g_.d_y.dtype, d_y);
    const Real* inputs = lane_.input(t - past_);
    for (std::int64_t c = 0; c < kChannels; c += lanes) {
      const auto sum = convolve(d, inputs + c, lane_.weight(0) + c, p_.taps);
      const auto slope = silu_slope(d, sum, sigmoid(d, sum));
      const auto d_a = hn::Mul(hn::Load(d, d_y + c), slope);
      hn::Store(d_a, d, d_sum(t) + c);
      for (std::int64_t tap = 0; tap < p_.taps; ++tap) {
        Real* target = d_weight_ + tap * kChannels + c;
        const auto x = hn::Load(d, inputs + tap * kChannels + c);
        hn::Store(hn::MulAdd(d_a, x, hn::Load(d, target)), d, target);
      }
    }
  }

  /// Stores the gradients of the inputs `first … first + count − 1`, whose d_a begin at row −past.
  void store_inputs(std::int64_t first, std::int64_t count) {
    const hn::ScalableTag<Real> d;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    HWY_ALIGN Real out[kChannels];
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t c = 0; c < kChannels; c += lanes) {
        auto sum = hn::Zero(d);
        for (std::int64_t tap = 0; tap < p_.taps; ++tap) {
          const auto d_a = hn::Load(d, d_sum(i - tap) + c);
          sum = hn::MulAdd(d_a, hn::Load(d, lane_.weight(tap) + c), sum);
        }
        hn::Store(sum, d, out + c);
      }
      store_input(first + i, out);
    }
  }

  void store_input(std::int64_t time, const Real* out) {
    const auto& to = time < 0 ? g_.d_state : g_.d_x;
    const auto offset = time < 0 ? lane_.state_offset(time + past_) : lane_.offset(time);
    store_row(out, lane_.count(), to.at(offset), to.dtype);
  }

  const ShortConvolutionParams& p_;
  const ShortConvolutionGradients& g_;
  Lane<Real> lane_;
  std::int64_t past_;
  AlignedBuffer<Real> d_sums_;
  Real* d_weight_;  // [taps, kChannels]
};

std::int64_t blocks(const ShortConvolutionParams& p) {
  return (p.channels + kChannels - 1) / kChannels;
}

template <class Real>
void forward(const ShortConvolutionParams& p, const Executor& executor) {
  const auto count = blocks(p);
  executor.run(p.batch * count,
               [&](std::int64_t task) { convolve_lane<Real>(p, task / count, task % count); });
}

/// Sums the parts of d_weight [batch, blocks, taps, kChannels] over the batch, in order.
template <class Real>
void store_d_weight(const ShortConvolutionParams& p, const ShortConvolutionGradients& g,
                    const Real* parts) {
  const auto stride = blocks(p) * p.taps * kChannels;
  for (std::int64_t c = 0; c < p.channels; ++c) {
    for (std::int64_t tap = 0; tap < p.taps; ++tap) {
      const auto index = (c / kChannels * p.taps + tap) * kChannels + c % kChannels;
      Real sum{0};
      for (std::int64_t b = 0; b < p.batch; ++b) sum += parts[b * stride + index];
      store_row(&sum, 1, g.d_weight.at(c * p.taps + tap), g.d_weight.dtype);
    }
  }
}

template <class Real>
void backward(const ShortConvolutionParams& p, const ShortConvolutionGradients& g,
              const Executor& executor) {
  const auto count = blocks(p);
  const auto part = p.taps * kChannels;
  AlignedBuffer<Real> parts(static_cast<std::size_t>(p.batch * count * part));
  executor.run(p.batch * count, [&](std::int64_t task) {
    Real* d_weight = parts.data() + task * part;
    std::fill_n(d_weight, part, Real{0});
    GradientLane<Real>(p, g, task / count, task % count, d_weight).run();
  });
  store_d_weight(p, g, parts.data());
}

void forward_any(const ShortConvolutionParams& p, const Executor& executor) {
  p.x.dtype == DType::kFloat64 ? forward<double>(p, executor) : forward<float>(p, executor);
}

void backward_any(const ShortConvolutionParams& p, const ShortConvolutionGradients& g,
                  const Executor& executor) {
  p.x.dtype == DType::kFloat64 ? backward<double>(p, g, executor) : backward<float>(p, g, executor);
}

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(forward_any);
HWY_EXPORT(backward_any);

}  // namespace fastweights::core

namespace fastweights::cpu {

void short_convolution(const ShortConvolutionParams& params, const Executor& executor) {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  HWY_DYNAMIC_DISPATCH(forward_any)(params, executor);
}

void short_convolution_backward(const ShortConvolutionParams& params,
                                const ShortConvolutionGradients& gradients,
                                const Executor& executor) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(backward_any)(params, gradients, executor);
}

}  // namespace fastweights::cpu

#endif  // HWY_ONCE
