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

// A task walks through kSegment tokens with a tile of kTokens tokens × kChannels channels in L2.
// Rows are long, so that memory is read in long runs.
constexpr std::int64_t kChannels = 512;
constexpr std::int64_t kTokens = 32;
constexpr std::int64_t kSegment = 64;

std::int64_t blocks(const ShortConvolutionParams& p) {
  return (p.channels + kChannels - 1) / kChannels;
}

/// At least one: the gradient of the state is written even without tokens.
std::int64_t segments(const ShortConvolutionParams& p) {
  return std::max<std::int64_t>(1, (p.tokens + kSegment - 1) / kSegment);
}

/// The weights [channels, taps] as [blocks, taps, kChannels], padded with zeros.
template <class Real>
AlignedBuffer<Real> transposed_weights(const ShortConvolutionParams& p) {
  const auto taps = p.taps;
  AlignedBuffer<Real> rows(static_cast<std::size_t>(p.channels * taps));
  load_row(p.weight.data, p.weight.dtype, p.channels * taps, rows.data());
  AlignedBuffer<Real> out(static_cast<std::size_t>(blocks(p) * taps * kChannels));
  std::fill_n(out.data(), out.size(), Real{0});
  for (std::int64_t c = 0; c < p.channels; ++c) {
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      out.data()[(c / kChannels * taps + tap) * kChannels + c % kChannels] =
          rows.data()[c * taps + tap];
    }
  }
  return out;
}

/// One task: kSegment tokens of a block of channels of one batch row.
struct Part {
  Part(const ShortConvolutionParams& p, std::int64_t task)
      : batch(task / (blocks(p) * segments(p))),
        block(task / segments(p) % blocks(p)),
        begin(task % segments(p) * kSegment),
        end(std::min(p.tokens, begin + kSegment)) {}

  static std::int64_t count(const ShortConvolutionParams& p) {
    return p.batch * blocks(p) * segments(p);
  }

  std::int64_t batch, block, begin, end;
};

/// One batch row and block of channels.
template <class Real>
class Lane {
 public:
  Lane(const ShortConvolutionParams& params, const Part& part, const Real* weights)
      : p_(params),
        batch_(part.batch),
        first_(part.block * kChannels),
        count_(std::min(kChannels, params.channels - first_)),
        width_(padded<Real>(count_)),
        weight_(weights + part.block * params.taps * kChannels),
        inputs_(static_cast<std::size_t>((params.taps - 1 + kTokens) * kChannels)) {}

  std::int64_t count() const { return count_; }
  /// `count()` in whole vectors.
  std::int64_t width() const { return width_; }
  const Real* weight(std::int64_t tap) const { return weight_ + tap * kChannels; }

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
    std::fill(out + count_, out + width_, Real{0});
  }

 private:
  const ShortConvolutionParams& p_;
  std::int64_t batch_, first_, count_, width_;
  const Real* weight_;  // [taps, kChannels]
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
void convolve_part(const ShortConvolutionParams& p, const Part& part, const Real* weights) {
  const hn::ScalableTag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  Lane<Real> lane(p, part, weights);
  HWY_ALIGN Real out[kChannels];
  for (auto begin = part.begin; begin < part.end; begin += kTokens) {
    const auto tokens = std::min(kTokens, part.end - begin);
    lane.load(begin, tokens);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const Real* inputs = lane.input(t - p.taps + 1);
      for (std::int64_t c = 0; c < lane.width(); c += lanes) {
        const auto sum = convolve(d, inputs + c, lane.weight(0) + c, p.taps);
        hn::Store(hn::Mul(sum, sigmoid(d, sum)), d, out + c);
      }
      store_row(out, lane.count(), p.y.at(lane.offset(begin + t)), p.y.dtype);
    }
  }
}

/// Gradients of one part. With a = convolution before the activation, d_x_t = Σ_w weight_w ⊙
/// d_a_{t + W − 1 − w}; d_a of the last W − 1 tokens is carried from tile to tile, that of the W −
/// 1 tokens after the part is formed here too, and x before the first token is the state.
template <class Real>
class GradientLane {
 public:
  GradientLane(const ShortConvolutionParams& params, const ShortConvolutionGradients& gradients,
               const Part& part, const Real* weights, Real* d_weight)
      : p_(params),
        g_(gradients),
        part_(part),
        lane_(params, part, weights),
        past_(params.taps - 1),
        d_sums_(static_cast<std::size_t>((past_ + std::max(kTokens, past_)) * kChannels)),
        d_weight_(d_weight) {}

  void run() {
    std::fill_n(d_sums_.data(), past_ * kChannels, Real{0});
    const auto end = std::min(p_.tokens, part_.end + past_);
    for (auto begin = part_.begin; begin < end; begin += kTokens) {
      const auto tokens = std::min(kTokens, end - begin);
      lane_.load(begin, tokens);
      for (std::int64_t t = 0; t < tokens; ++t) add_token(begin + t, t);
      store_inputs(begin - past_, tokens);
      std::copy_n(d_sum(tokens - past_), past_ * kChannels, d_sum(-past_));
    }
    std::fill_n(d_sum(0), past_ * kChannels, Real{0});
    store_inputs(end - past_, past_);
  }

 private:
  /// Row `t` of the tile's d_a; −past is the first.
  Real* d_sum(std::int64_t t) { return d_sums_.data() + (t + past_) * kChannels; }

  /// Forms d_a of a token; adds its share of d_weight if it belongs to the part.
  void add_token(std::int64_t time, std::int64_t t) {
    const hn::ScalableTag<Real> d;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    HWY_ALIGN Real d_y[kChannels];
    lane_.load_block(g_.d_y.at(lane_.offset(time)), g_.d_y.dtype, d_y);
    const Real* inputs = lane_.input(t - past_);
    const auto taps = time < part_.end ? p_.taps : 0;
    for (std::int64_t c = 0; c < lane_.width(); c += lanes) {
      const auto sum = convolve(d, inputs + c, lane_.weight(0) + c, p_.taps);
      const auto slope = silu_slope(d, sum, sigmoid(d, sum));
      const auto d_a = hn::Mul(hn::Load(d, d_y + c), slope);
      hn::Store(d_a, d, d_sum(t) + c);
      for (std::int64_t tap = 0; tap < taps; ++tap) {
        Real* target = d_weight_ + tap * kChannels + c;
        const auto x = hn::Load(d, inputs + tap * kChannels + c);
        hn::Store(hn::MulAdd(d_a, x, hn::Load(d, target)), d, target);
      }
    }
  }

  /// Stores the gradients of the inputs `first … first + count − 1`, whose d_a begin at row −past,
  /// as far as they belong to the part; the state belongs to the first one.
  void store_inputs(std::int64_t first, std::int64_t count) {
    const hn::ScalableTag<Real> d;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    HWY_ALIGN Real out[kChannels];
    const auto begin = part_.begin == 0 ? -past_ : part_.begin;
    for (auto i = std::max<std::int64_t>(0, begin - first); i < count; ++i) {
      if (first + i >= part_.end) return;
      for (std::int64_t c = 0; c < lane_.width(); c += lanes) {
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
  const Part part_;
  Lane<Real> lane_;
  std::int64_t past_;
  AlignedBuffer<Real> d_sums_;
  Real* d_weight_;  // [taps, kChannels]
};

template <class Real>
void forward(const ShortConvolutionParams& p, const Executor& executor) {
  const auto weights = transposed_weights<Real>(p);
  executor.run(Part::count(p),
               [&](std::int64_t task) { convolve_part<Real>(p, Part(p, task), weights.data()); });
}

/// Sums the parts of d_weight [batch, blocks, segments, taps, kChannels], in order.
template <class Real>
void store_d_weight(const ShortConvolutionParams& p, const ShortConvolutionGradients& g,
                    const Real* parts) {
  const auto size = p.taps * kChannels;
  AlignedBuffer<Real> sums(static_cast<std::size_t>(blocks(p) * size));
  std::fill_n(sums.data(), sums.size(), Real{0});
  for (std::int64_t task = 0; task < Part::count(p); ++task) {
    add_scaled_row(parts + task * size, Real{1}, size, sums.data() + Part(p, task).block * size);
  }
  for (std::int64_t c = 0; c < p.channels; ++c) {
    for (std::int64_t tap = 0; tap < p.taps; ++tap) {
      const Real* sum = sums.data() + c / kChannels * size + tap * kChannels + c % kChannels;
      store_row(sum, 1, g.d_weight.at(c * p.taps + tap), g.d_weight.dtype);
    }
  }
}

template <class Real>
void backward(const ShortConvolutionParams& p, const ShortConvolutionGradients& g,
              const Executor& executor) {
  const auto weights = transposed_weights<Real>(p);
  const auto size = p.taps * kChannels;
  AlignedBuffer<Real> parts(static_cast<std::size_t>(Part::count(p) * size));
  executor.run(Part::count(p), [&](std::int64_t task) {
    Real* d_weight = parts.data() + task * size;
    std::fill_n(d_weight, size, Real{0});
    GradientLane<Real>(p, g, Part(p, task), weights.data(), d_weight).run();
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
