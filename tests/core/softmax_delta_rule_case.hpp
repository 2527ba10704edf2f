#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "fastweights/core/softmax_delta_rule.hpp"

// One call of the softmax delta rule on memory of its own, and the rule as it is written down:
// token by token in fp64, nothing shared with the kernels.

namespace fastweights::test {

struct SoftmaxCaseOptions {
  std::int64_t B = 1;
  std::int64_t T = 1;
  std::int64_t D = 1;
  std::int64_t N = 1;
  bool pending = false;
  bool gate = true;
  bool initial_state = true;
  double unknown = 0.0;     // share of tokens without a target
  double unwritten = 0.0;   // share of strengths that are zero
  double forgetting = 0.0;  // share of gates that are −∞
  std::uint64_t seed = 1;
};

using Values = std::map<std::string, std::vector<double>>;

struct SoftmaxCase {
  SoftmaxCaseOptions options;
  Values inputs;  // h logits eta, g, initial_state
  std::vector<std::int64_t> target;

  explicit SoftmaxCase(const SoftmaxCaseOptions& o) : options(o) {
    std::mt19937_64 random(o.seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    const auto fill = [&](const char* name, std::int64_t count, const auto& draw) {
      auto& values = inputs[name];
      for (std::int64_t i = 0; i < count; ++i) values.push_back(draw());
    };
    const auto tokens = o.B * o.T;
    fill("h", tokens * o.D, [&] { return normal(random); });
    fill("logits", tokens * o.N, [&] { return 2.0 * normal(random); });
    fill("eta", tokens, [&] { return uniform(random) < o.unwritten ? 0.0 : uniform(random); });
    if (o.gate) {
      fill("g", tokens, [&] {
        return uniform(random) < o.forgetting ? -std::numeric_limits<double>::infinity()
                                              : -0.3 * uniform(random) * uniform(random);
      });
    }
    if (o.initial_state) fill("initial_state", o.B * o.D * o.N, [&] { return normal(random); });
    std::uniform_int_distribution<std::int64_t> any(0, o.N - 1);
    for (std::int64_t i = 0; i < tokens; ++i) {
      target.push_back(uniform(random) < o.unknown ? -1 : any(random));
    }
  }
};

struct SoftmaxOutputs {
  std::vector<double> corrected, final_state;
};

/// The rule as it is written down.
inline SoftmaxOutputs oracle(const SoftmaxCase& c) {
  const auto& o = c.options;
  const auto size = [](std::int64_t count) { return static_cast<std::size_t>(count); };
  SoftmaxOutputs out{c.inputs.at("logits"), std::vector<double>(size(o.B * o.D * o.N))};
  if (o.initial_state) out.final_state = c.inputs.at("initial_state");
  for (std::int64_t i = 0; i < o.B * o.T; ++i) {
    double* F = out.final_state.data() + i / o.T * o.D * o.N;
    std::vector<double> hidden(c.inputs.at("h").begin() + i * o.D,
                               c.inputs.at("h").begin() + (i + 1) * o.D);
    double squares = 0;
    for (const double x : hidden) squares += x * x;
    for (double& x : hidden) x /= std::sqrt(squares + 1e-6);
    double* z = out.corrected.data() + i * o.N;
    for (std::int64_t d = 0; d < o.D && !(o.pending && i % o.T == 0); ++d) {
      for (std::int64_t n = 0; n < o.N; ++n) z[n] += hidden[size(d)] * F[d * o.N + n];
    }
    if (c.target[size(i)] < 0) continue;
    const double most = *std::max_element(z, z + o.N);
    double sum = 0;
    for (std::int64_t n = 0; n < o.N; ++n) sum += std::exp(z[n] - most);
    const double decay = o.gate ? std::exp(c.inputs.at("g")[size(i)]) : 1.0;
    for (std::int64_t n = 0; n < o.N; ++n) {
      const double error = (n == c.target[size(i)] ? 1.0 : 0.0) - std::exp(z[n] - most) / sum;
      for (std::int64_t d = 0; d < o.D; ++d) {
        F[d * o.N + n] =
            decay * F[d * o.N + n] + c.inputs.at("eta")[size(i)] * hidden[size(d)] * error;
      }
    }
  }
  return out;
}

/// A call of the kernels in `Real`; outputs start as NaN.
template <class Real>
class SoftmaxCall {
 public:
  explicit SoftmaxCall(const SoftmaxCase& c) : case_(c), target_(c.target) {
    for (const auto& [name, values] : c.inputs) {
      inputs_[name].assign(values.begin(), values.end());
    }
    corrected = nan_like("logits");
    const auto& o = c.options;
    final_state.assign(static_cast<std::size_t>(o.B * o.D * o.N), kNaN);
  }

  core::SoftmaxDeltaRuleParams<Real> params() {
    const auto& o = case_.options;
    core::SoftmaxDeltaRuleParams<Real> p;
    p.B = o.B;
    p.T = o.T;
    p.D = o.D;
    p.N = o.N;
    p.pending = o.pending;
    p.h = input("h");
    p.logits = input("logits");
    p.target = target_.data();
    p.eta = input("eta");
    p.g = input("g");
    if (o.initial_state) p.initial_state = inputs_.at("initial_state").data();
    p.final_state = final_state.data();
    p.corrected = array(corrected);
    return p;
  }

  /// Runs the backward pass, for the gradients of a linear loss; needs `corrected`.
  std::map<std::string, std::vector<Real>> gradients(const SoftmaxOutputs& weights,
                                                     const core::Executor& executor) {
    std::map<std::string, std::vector<Real>> d;
    for (const char* name : {"h", "logits", "eta", "g"}) d[name] = nan_like(name);
    d["initial_state"] = std::vector<Real>(final_state.size(), kNaN);
    const std::vector<Real> d_corrected(weights.corrected.begin(), weights.corrected.end());
    const std::vector<Real> d_final(weights.final_state.begin(), weights.final_state.end());
    core::SoftmaxDeltaRuleGradients<Real> g;
    g.d_corrected = {d_corrected.data(), core::dtype_of<Real>()};
    g.d_final_state = d_final.data();
    g.d_h = array(d["h"]);
    g.d_logits = array(d["logits"]);
    g.d_eta = array(d["eta"]);
    if (case_.options.gate) g.d_g = array(d["g"]);
    g.d_initial_state = d["initial_state"].data();
    cpu::softmax_delta_rule_forms<Real>().backward(params(), g, executor);
    return d;
  }

  std::vector<Real> corrected, final_state;

 private:
  static constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();

  std::vector<Real> nan_like(const char* name) const {
    const auto found = inputs_.find(name);
    return std::vector<Real>(found == inputs_.end() ? 0 : found->second.size(), kNaN);
  }
  core::ConstArray input(const char* name) const {
    const auto found = inputs_.find(name);
    if (found == inputs_.end()) return {};
    return {found->second.data(), core::dtype_of<Real>()};
  }
  static core::Array array(std::vector<Real>& values) {
    return {values.data(), core::dtype_of<Real>()};
  }

  const SoftmaxCase& case_;
  std::vector<std::int64_t> target_;
  std::map<std::string, std::vector<Real>> inputs_;
};

}  // namespace fastweights::test
