#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "fastweights/core/rows-inl.hpp"
#include "fastweights/core/rule.hpp"

// One call of a delta rule on memory of its own, in any element type, beside the same call in fp64.

namespace fastweights::test {

using core::DType;
using core::Shape;

/// What is called and with which numbers.
struct CaseOptions {
  Shape shape;
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> cu_seqlens = {};
  bool gated = true;
  bool use_qk_l2norm = false;
  bool initial_state = true;
  double gate_scale = 0.1;  // g is −gate_scale · |normal|
  double beta_limit = 2.0;  // β is uniform in [0, beta_limit]
  std::uint64_t seed = 1;
};

/// A tensor in its own element type and, exactly the same numbers, in fp64. Rows are laid out with
/// gaps of NaN between them, so that a kernel that reads or writes past a row shows.
class Rows {
 public:
  Rows(std::int64_t batch, std::int64_t time, std::int64_t heads, std::int64_t size, DType dtype)
      : batch_(batch), time_(time), heads_(heads), size_(size), dtype_(dtype) {
    const auto count = static_cast<std::size_t>(batch * time * heads * stride());
    exact_.assign(count, std::numeric_limits<double>::quiet_NaN());
    bytes_.resize(count * core::size_of(dtype));
    for (std::size_t i = 0; i < count; ++i) put(i, exact_[i]);
  }

  template <class Function>
  void fill(const Function& function) {
    each([&](std::size_t i) { set(i, function()); });
  }

  /// Sets one element to what the element type makes of `value`.
  void set(std::size_t i, double value) {
    put(i, value);
    exact_[i] = get(i);
  }

  template <class Function>
  void each(const Function& function) const {
    for (std::int64_t row = 0; row < batch_ * time_ * heads_; ++row) {
      for (std::int64_t j = 0; j < size_; ++j) {
        function(static_cast<std::size_t>(row * stride() + j));
      }
    }
  }

  void clear_exact() { exact_.assign(exact_.size(), 0.0); }

  double exact(std::size_t i) const { return exact_[i]; }

  double get(std::size_t i) const {
    const auto* at = bytes_.data() + i * core::size_of(dtype_);
    return core::HWY_NAMESPACE::load_scalar<double>(at, dtype_);
  }

  /// Whether everything between the rows is still NaN.
  bool gaps_untouched() const {
    for (std::int64_t row = 0; row < batch_ * time_ * heads_; ++row) {
      for (std::int64_t j = size_; j < stride(); ++j) {
        const double value = get(static_cast<std::size_t>(row * stride() + j));
        if (value == value) return false;
      }
    }
    return true;
  }

  core::ConstView const_view() const { return {bytes_.data(), dtype_, step(3), step(2), stride()}; }
  core::View view() { return {bytes_.data(), dtype_, step(3), step(2), stride()}; }
  core::ConstView exact_const_view() const {
    return {exact_.data(), DType::kFloat64, step(3), step(2), stride()};
  }
  core::View exact_view() { return {exact_.data(), DType::kFloat64, step(3), step(2), stride()}; }

 private:
  static constexpr std::int64_t kGap = 3;
  std::int64_t stride() const { return size_ + kGap; }
  std::int64_t step(int dimension) const {
    return dimension == 3 ? time_ * heads_ * stride() : heads_ * stride();
  }
  void put(std::size_t i, double value) {
    core::HWY_NAMESPACE::store_row(&value, 1, bytes_.data() + i * core::size_of(dtype_), dtype_);
  }

  std::int64_t batch_, time_, heads_, size_;
  DType dtype_;
  std::vector<double> exact_;
  std::vector<std::byte> bytes_;
};

/// The state, always without gaps, in the type of the arithmetic and in fp64.
template <class Real>
struct States {
  explicit States(std::size_t size)
      : values(size, std::numeric_limits<Real>::quiet_NaN()),
        exact(size, std::numeric_limits<double>::quiet_NaN()) {}
  std::vector<Real> values;
  std::vector<double> exact;
};

/// RMS(error) / RMS(exact): the measure of every tolerance (docs/testing.md).
class ErrorRatio {
 public:
  void add(double value, double exact) {
    // A NaN on either side makes the ratio NaN, which fails every comparison.
    error_ += (value - exact) * (value - exact);
    size_ += exact * exact;
  }
  double ratio() const { return error_ == 0.0 ? 0.0 : std::sqrt(error_ / size_); }

 private:
  double error_ = 0;
  double size_ = 0;
};

inline double error_ratio(const Rows& rows) {
  ErrorRatio ratio;
  rows.each([&](std::size_t i) { ratio.add(rows.get(i), rows.exact(i)); });
  return ratio.ratio();
}

template <class Real>
double error_ratio(const States<Real>& states) {
  ErrorRatio ratio;
  for (std::size_t i = 0; i < states.values.size(); ++i)
    ratio.add(states.values[i], states.exact[i]);
  return ratio.ratio();
}

/// Inputs, outputs and gradients of one call, and of the same call in fp64.
template <class Real>
struct DeltaRuleCase {
  explicit DeltaRuleCase(const CaseOptions& given)
      : options(given),
        q(s().B, s().T, s().H, s().K, given.dtype),
        k(s().B, s().T, s().H, s().K, given.dtype),
        v(s().B, s().T, s().HV, s().V, given.dtype),
        beta(s().B, s().T, s().HV, 1, given.dtype),
        g(s().B, s().T, s().HV, 1, given.dtype),
        o(s().B, s().T, s().HV, s().V, given.dtype),
        d_o(o),
        d_q(q),
        d_k(q),
        d_v(o),
        d_beta(beta),
        d_g(g),
        initial(state_size()),
        final_state(state_size()),
        d_final(state_size()),
        d_initial(state_size()) {
    std::mt19937_64 random(options.seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    // Keys of about unit length: β‖k‖² beyond 2 would diverge in every precision.
    const double key_scale =
        options.use_qk_l2norm ? 1.0 : 1.0 / std::sqrt(static_cast<double>(s().K));
    q.fill([&] { return normal(random); });
    k.fill([&] { return 0.9 * key_scale * normal(random); });
    v.fill([&] { return normal(random); });
    d_o.fill([&] { return normal(random); });
    beta.fill([&] { return options.beta_limit * uniform(random); });
    g.fill([&] { return -options.gate_scale * std::abs(normal(random)); });
    for (auto* states : {&initial, &d_final}) {
      for (std::size_t i = 0; i < states->values.size(); ++i) {
        states->values[i] = static_cast<Real>(normal(random));
        states->exact[i] = states->values[i];
      }
    }
  }

  const Shape& s() const { return options.shape; }

  std::size_t state_size() const {
    const auto n = options.cu_seqlens.empty()
                       ? s().B
                       : static_cast<std::int64_t>(options.cu_seqlens.size()) - 1;
    return static_cast<std::size_t>(n * s().HV * s().K * s().V);
  }

  template <class Number>
  core::RuleParams<Number> common() const {
    core::RuleParams<Number> p;
    p.shape = s();
    p.cu_seqlens = options.cu_seqlens;
    p.scale = 1.0 / std::sqrt(static_cast<double>(s().K));
    p.use_qk_l2norm = options.use_qk_l2norm;
    return p;
  }

  core::RuleParams<Real> params() {
    auto p = common<Real>();
    p.q = q.const_view();
    p.k = k.const_view();
    p.v = v.const_view();
    p.beta = beta.const_view();
    if (options.gated) p.g = g.const_view();
    if (options.initial_state) p.initial_state = initial.values.data();
    p.final_state = final_state.values.data();
    p.o = o.view();
    return p;
  }

  core::RuleParams<double> exact_params() {
    auto p = common<double>();
    p.q = q.exact_const_view();
    p.k = k.exact_const_view();
    p.v = v.exact_const_view();
    p.beta = beta.exact_const_view();
    if (options.gated) p.g = g.exact_const_view();
    if (options.initial_state) p.initial_state = initial.exact.data();
    p.final_state = final_state.exact.data();
    p.o = o.exact_view();
    return p;
  }

  core::RuleGradients<Real> gradients() {
    core::RuleGradients<Real> d;
    d.d_o = d_o.const_view();
    d.d_final_state = d_final.values.data();
    d.d_q = d_q.view();
    d.d_k = d_k.view();
    d.d_v = d_v.view();
    d.d_beta = d_beta.view();
    if (options.gated) d.d_g = d_g.view();
    d.d_initial_state = d_initial.values.data();
    return d;
  }

  core::RuleGradients<double> exact_gradients() {
    d_q.clear_exact();
    d_k.clear_exact();
    core::RuleGradients<double> d;
    d.d_o = d_o.exact_const_view();
    d.d_final_state = d_final.exact.data();
    d.d_q = d_q.exact_view();
    d.d_k = d_k.exact_view();
    d.d_v = d_v.exact_view();
    d.d_beta = d_beta.exact_view();
    if (options.gated) d.d_g = d_g.exact_view();
    d.d_initial_state = d_initial.exact.data();
    return d;
  }

  CaseOptions options;
  Rows q, k, v, beta, g, o, d_o, d_q, d_k, d_v, d_beta, d_g;
  States<Real> initial, final_state, d_final, d_initial;
};

}  // namespace fastweights::test
