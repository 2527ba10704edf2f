#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "fastweights/core/rule.hpp"

// One call of a rule that has core::RuleForms, on memory of its own, and the rule as it is written
// down: token by token in fp64, nothing shared with the kernels.

namespace fastweights::test {

/// The rules, for the oracle.
enum class RuleName { kLinearAttention, kKda, kGeneralizedDeltaRule, kMomentumDeltaRule };

struct RuleCaseOptions {
  RuleName rule = RuleName::kKda;
  core::Shape shape;
  std::vector<std::int64_t> cu_seqlens = {};
  bool gate = true;
  bool use_qk_l2norm = false;
  bool initial_state = true;
  bool reading_key = true;  // p, of the momentum rule
  double forgetting = 0.0;  // share of gates that are −∞
  std::uint64_t seed = 1;
};

/// Tensors by name, in fp64, rows adjacent.
using Tensors = std::map<std::string, std::vector<double>>;

struct RuleCase {
  RuleCaseOptions options;
  core::Shape shape;
  double scale;
  Tensors inputs;  // q k v g beta a b p mu eta, initial_state, initial_momentum; those the rule has

  bool channel_gate() const {
    return options.rule == RuleName::kKda || options.rule == RuleName::kGeneralizedDeltaRule;
  }
  bool momentum() const { return options.rule == RuleName::kMomentumDeltaRule; }
  std::int64_t sequences() const {
    return options.cu_seqlens.empty() ? shape.B
                                      : static_cast<std::int64_t>(options.cu_seqlens.size()) - 1;
  }
  std::int64_t state_size() const { return sequences() * shape.HV * shape.K * shape.V; }
  std::int64_t output_size() const { return shape.B * shape.T * shape.HV * shape.V; }

  explicit RuleCase(const RuleCaseOptions& o)
      : options(o), shape(o.shape), scale(1.0 / std::sqrt(static_cast<double>(o.shape.K))) {
    std::mt19937_64 random(o.seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    const std::int64_t tokens = shape.B * shape.T;
    const auto fill = [&](const char* name, std::int64_t count, const auto& draw) {
      auto& values = inputs[name];
      for (std::int64_t i = 0; i < count; ++i) values.push_back(draw());
    };
    const std::int64_t keys = tokens * shape.H * shape.K;
    const double unit = 0.9 / std::sqrt(static_cast<double>(shape.K));
    const auto feature = [&] { return unit * normal(random); };
    const auto strength = [&] { return uniform(random); };
    const auto decay = [&] {
      return uniform(random) < o.forgetting ? -std::numeric_limits<double>::infinity()
                                            : -0.5 * uniform(random) * uniform(random);
    };
    fill("q", keys, [&] { return normal(random); });
    fill("k", keys, feature);
    fill("v", tokens * shape.HV * shape.V, [&] { return normal(random); });
    if (o.gate) fill("g", tokens * shape.HV * (channel_gate() ? shape.K : 1), decay);
    if (o.rule == RuleName::kKda || momentum()) fill("beta", tokens * shape.HV, strength);
    if (o.rule == RuleName::kGeneralizedDeltaRule) {
      fill("a", keys, feature);
      fill("b", keys, [&] { return -feature(); });
    }
    if (momentum()) {
      fill("mu", tokens * shape.HV, [&] { return 0.8 * strength(); });
      fill("eta", tokens * shape.HV, strength);
      if (o.reading_key) fill("p", keys, feature);
    }
    if (o.initial_state) {
      fill("initial_state", state_size(), [&] { return normal(random); });
      if (momentum()) fill("initial_momentum", state_size(), [&] { return normal(random); });
    }
  }
};

struct RuleOutputs {
  std::vector<double> o, final_state, final_momentum;
};

/// The rule as it is written down.
inline RuleOutputs oracle(const RuleCase& c) {
  const auto& s = c.shape;
  RuleOutputs out;
  out.o.assign(static_cast<std::size_t>(c.output_size()), 0);
  out.final_state.assign(static_cast<std::size_t>(c.state_size()), 0);
  out.final_momentum = out.final_state;
  const auto input = [&](const char* name, std::int64_t index, double otherwise) {
    const auto found = c.inputs.find(name);
    return found == c.inputs.end() ? otherwise : found->second[static_cast<std::size_t>(index)];
  };
  std::int64_t groups = s.HV / s.H;
  for (std::int64_t n = 0; n < c.sequences(); ++n) {
    const auto& cu = c.options.cu_seqlens;
    const auto i = static_cast<std::size_t>(n);
    const std::int64_t begin = cu.empty() ? n * s.T : cu[i];
    const std::int64_t end = cu.empty() ? begin + s.T : cu[i + 1];
    for (std::int64_t hv = 0; hv < s.HV; ++hv) {
      const std::int64_t offset = (n * s.HV + hv) * s.K * s.V;
      std::vector<double> S, M;
      for (std::int64_t x = 0; x < s.K * s.V; ++x) {
        S.push_back(input("initial_state", offset + x, 0));
        M.push_back(input("initial_momentum", offset + x, 0));
      }
      for (std::int64_t t = begin; t < end; ++t) {  // B · T is one axis here
        const std::int64_t key = (t * s.H + hv / groups) * s.K;
        const std::int64_t gate = t * s.HV + hv;
        const auto row = [&](const char* name) {
          std::vector<double> x;
          for (std::int64_t r = 0; r < s.K; ++r) x.push_back(input(name, key + r, 0));
          return x;
        };
        auto q = row("q"), k = row("k"), a = row("a"), b = row("b");
        if (c.options.use_qk_l2norm) {
          for (auto* x : {&q, &k}) {
            double sum = 1e-6;
            for (const double value : *x) sum += value * value;
            for (double& value : *x) value /= std::sqrt(sum);
          }
        }
        const auto p = c.inputs.contains("p") ? row("p") : k;
        const double beta = input("beta", gate, 1);
        const double mu = input("mu", gate, 0);
        const double eta = input("eta", gate, 1);
        for (std::int64_t col = 0; col < s.V; ++col) {
          const double v = c.inputs.at("v")[static_cast<std::size_t>(gate * s.V + col)];
          const auto at = [&](std::int64_t r) { return static_cast<std::size_t>(r * s.V + col); };
          const auto read = [&](const std::vector<double>& x) {
            double sum = 0;
            for (std::int64_t r = 0; r < s.K; ++r) sum += S[at(r)] * x[static_cast<std::size_t>(r)];
            return sum;
          };
          const double before_a = read(a);
          const double before_p = read(p);
          for (std::int64_t r = 0; r < s.K; ++r) {
            S[at(r)] *= std::exp(input("g", c.channel_gate() ? gate * s.K + r : gate, 0));
          }
          const double decayed_k = read(k);
          for (std::int64_t r = 0; r < s.K; ++r) {
            const double key_r = k[static_cast<std::size_t>(r)];
            switch (c.options.rule) {
              case RuleName::kLinearAttention: S[at(r)] += key_r * v; break;
              case RuleName::kKda: S[at(r)] += beta * key_r * (v - decayed_k); break;
              case RuleName::kGeneralizedDeltaRule:
                S[at(r)] += b[static_cast<std::size_t>(r)] * before_a + key_r * v;
                break;
              case RuleName::kMomentumDeltaRule:
                M[at(r)] = mu * M[at(r)] + eta * key_r * (v - before_p);
                S[at(r)] += beta * M[at(r)];
                break;
            }
          }
          out.o[static_cast<std::size_t>(gate * s.V + col)] = c.scale * read(q);
        }
      }
      std::copy(S.begin(), S.end(), out.final_state.begin() + offset);
      std::copy(M.begin(), M.end(), out.final_momentum.begin() + offset);
    }
  }
  return out;
}

/// Gradients of Σ weights · outputs of the rules without a momentum, by name, token by token.
inline Tensors gradient_oracle(const RuleCase& c, const RuleOutputs& weights) {
  using Row = std::vector<double>;
  const auto& s = c.shape;
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  const std::size_t K = size(s.K), V = size(s.V);
  Tensors d;
  for (const auto& [name, values] : c.inputs) d[name].assign(values.size(), 0);
  const auto slice = [&](const char* name, std::int64_t first, std::size_t count) {
    Row out(count, 0);
    const auto found = c.inputs.find(name);
    if (found == c.inputs.end()) return out;
    for (std::size_t i = 0; i < count; ++i) out[i] = found->second[size(first) + i];
    return out;
  };
  const auto add = [&](const char* name, std::int64_t first, const Row& row) {
    const auto found = d.find(name);
    if (found == d.end()) return;
    for (std::size_t i = 0; i < row.size(); ++i) found->second[size(first) + i] += row[i];
  };
  // Through x · rsqrt(Σx² + 1e-6).
  const auto inverse_norm = [&](const Row& x) {
    double sum = 1e-6;
    for (const double value : x) sum += value * value;
    return c.options.use_qk_l2norm ? 1 / std::sqrt(sum) : 1.0;
  };
  const auto add_feature = [&](const char* name, std::int64_t first, Row row) {
    const Row x = slice(name, first, K);
    const double norm = inverse_norm(x);
    double along = 0;
    for (std::size_t r = 0; r < K; ++r) along += x[r] * row[r];
    if (!c.options.use_qk_l2norm) along = 0;
    for (std::size_t r = 0; r < K; ++r) row[r] = norm * (row[r] - norm * norm * along * x[r]);
    add(name, first, row);
  };
  const auto times = [&](const Row& matrix, const Row& right) {  // over values
    Row out(K, 0);
    for (std::size_t r = 0; r < K; ++r) {
      for (std::size_t x = 0; x < V; ++x) out[r] += matrix[r * V + x] * right[x];
    }
    return out;
  };
  const auto transposed_times = [&](const Row& matrix, const Row& left) {  // over keys
    Row out(V, 0);
    for (std::size_t r = 0; r < K; ++r) {
      for (std::size_t x = 0; x < V; ++x) out[x] += matrix[r * V + x] * left[r];
    }
    return out;
  };
  const auto add_outer = [&](const Row& left, const Row& right, double factor, Row& matrix) {
    for (std::size_t r = 0; r < K; ++r) {
      for (std::size_t x = 0; x < V; ++x) matrix[r * V + x] += factor * left[r] * right[x];
    }
  };
  for (std::int64_t n = 0; n < c.sequences(); ++n) {
    const auto& cu = c.options.cu_seqlens;
    const std::int64_t begin = cu.empty() ? n * s.T : cu[size(n)];
    const std::int64_t end = cu.empty() ? begin + s.T : cu[size(n) + 1];
    for (std::int64_t hv = 0; hv < s.HV; ++hv) {
      const std::int64_t offset = (n * s.HV + hv) * s.K * s.V;
      struct Token {
        Row q, k, v, a, b, alpha, decayed, read, after;
        double beta = 1;
      };
      std::vector<Token> tokens;
      Row state = slice("initial_state", offset, K * V);
      const Row initial = state;
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t key = (t * s.H + hv / (s.HV / s.H)) * s.K;
        const std::int64_t gate = t * s.HV + hv;
        Token x;
        x.q = slice("q", key, K), x.k = slice("k", key, K);
        x.a = slice("a", key, K), x.b = slice("b", key, K);
        x.v = slice("v", gate * s.V, V);
        for (Row* row : {&x.q, &x.k}) {
          const double norm = inverse_norm(*row);
          for (double& value : *row) value *= norm;
        }
        if (c.inputs.contains("beta")) x.beta = c.inputs.at("beta")[size(gate)];
        x.alpha = c.channel_gate() ? slice("g", gate * s.K, K) : Row(K, slice("g", gate, 1)[0]);
        for (double& value : x.alpha) value = std::exp(value);
        const Row before_a = transposed_times(state, x.a);
        for (std::size_t i = 0; i < K * V; ++i) state[i] *= x.alpha[i / V];
        x.decayed = state;
        x.read = before_a;
        Row write = x.v;
        if (c.options.rule == RuleName::kKda) {
          x.read = transposed_times(state, x.k);
          for (std::size_t i = 0; i < V; ++i) write[i] = x.beta * (x.v[i] - x.read[i]);
        }
        if (c.options.rule == RuleName::kGeneralizedDeltaRule) add_outer(x.b, x.read, 1, state);
        add_outer(x.k, write, 1, state);
        x.after = state;
        tokens.push_back(std::move(x));
      }
      Row d_state(weights.final_state.begin() + offset,
                  weights.final_state.begin() + offset + s.K * s.V);
      for (std::int64_t t = end - 1; t >= begin; --t) {
        const Token& x = tokens[size(t - begin)];
        const std::int64_t key = (t * s.H + hv / (s.HV / s.H)) * s.K;
        const std::int64_t gate = t * s.HV + hv;
        const Row d_o(weights.o.begin() + gate * s.V, weights.o.begin() + (gate + 1) * s.V);
        Row d_q = times(x.after, d_o);
        for (double& value : d_q) value *= c.scale;
        add_feature("q", key, d_q);
        add_outer(x.q, d_o, c.scale, d_state);
        Row d_decayed = d_state;  // also of what precedes it, but for a
        Row d_value = transposed_times(d_state, x.k);
        Row d_before(K * V, 0);
        if (c.options.rule == RuleName::kKda) {
          Row error(V);
          for (std::size_t i = 0; i < V; ++i) error[i] = x.v[i] - x.read[i];
          Row d_k = times(d_state, error);
          double d_beta = 0;
          for (std::size_t r = 0; r < K; ++r) d_beta += x.k[r] * d_k[r];
          add("beta", gate, {d_beta});
          for (double& value : d_value) value *= x.beta;
          const Row through = times(x.decayed, d_value);
          for (std::size_t r = 0; r < K; ++r) d_k[r] = x.beta * d_k[r] - through[r];
          add_feature("k", key, d_k);
          add_outer(x.k, d_value, -1, d_decayed);
        } else {
          add_feature("k", key, times(d_state, x.v));
        }
        add("v", gate * s.V, d_value);
        if (c.options.rule == RuleName::kGeneralizedDeltaRule) {
          const Row& before = t > begin ? tokens[size(t - begin - 1)].after : initial;
          const Row d_read = transposed_times(d_state, x.b);
          add("b", key, times(d_state, x.read));
          add("a", key, times(before, d_read));
          add_outer(x.a, d_read, 1, d_before);
        }
        Row d_g(K, 0);
        double sum = 0;
        for (std::size_t i = 0; i < K * V; ++i) {
          const double share = d_decayed[i] * x.decayed[i];
          d_g[i / V] += share;
          sum += share;
          d_state[i] = x.alpha[i / V] * d_decayed[i] + d_before[i];
        }
        if (c.channel_gate()) {
          add("g", gate * s.K, d_g);
        } else {
          add("g", gate, {sum});
        }
      }
      add("initial_state", offset, d_state);
    }
  }
  return d;
}

/// The same call in `Real`, with outputs and gradients that start as NaN.
template <class Real>
class RuleCall {
 public:
  explicit RuleCall(const RuleCase& c) : case_(c) {
    for (const auto& [name, values] : c.inputs) {
      inputs_[name].assign(values.begin(), values.end());
      gradients_[name].assign(values.size(), nan());
    }
    o.assign(static_cast<std::size_t>(c.output_size()), nan());
    final_state.assign(static_cast<std::size_t>(c.state_size()), nan());
    final_momentum = final_state;
  }

  core::RuleParams<Real> params() {
    core::RuleParams<Real> p;
    p.shape = case_.shape;
    p.cu_seqlens = case_.options.cu_seqlens;
    p.scale = case_.scale;
    p.use_qk_l2norm = case_.options.use_qk_l2norm;
    p.channel_gate = case_.channel_gate();
    visit(p, [&](const char* name, core::ConstView& view) {
      if (inputs_.contains(name)) view = as_const(this->view(name, inputs_[name]));
    });
    p.initial_state = pointer("initial_state", inputs_);
    p.initial_momentum = pointer("initial_momentum", inputs_);
    p.final_state = final_state.data();
    if (case_.momentum()) p.final_momentum = final_momentum.data();
    p.o = view("v", o);
    return p;
  }

  /// Gradients of Σ weights · outputs, in the order of `RuleOutputs`.
  core::RuleGradients<Real> gradients(const RuleOutputs& weights) {
    d_o_.assign(weights.o.begin(), weights.o.end());
    d_state_.assign(weights.final_state.begin(), weights.final_state.end());
    d_momentum_.assign(weights.final_momentum.begin(), weights.final_momentum.end());
    core::RuleGradients<Real> d;
    d.d_o = as_const(view("v", d_o_));
    d.d_final_state = d_state_.data();
    if (case_.momentum()) d.d_final_momentum = d_momentum_.data();
    visit(d, [&](const char* name, core::View& target) {
      if (gradients_.contains(name)) target = view(name, gradients_[name]);
    });
    d.d_initial_state = pointer("initial_state", gradients_);
    d.d_initial_momentum = pointer("initial_momentum", gradients_);
    return d;
  }

  const std::map<std::string, std::vector<Real>>& gradients() const { return gradients_; }

  std::vector<Real> o, final_state, final_momentum;

 private:
  static Real nan() { return std::numeric_limits<Real>::quiet_NaN(); }

  using Storage = std::map<std::string, std::vector<Real>>;

  static Real* pointer(const char* name, Storage& storage) {
    return storage.contains(name) ? storage[name].data() : nullptr;
  }

  core::View view(const std::string& name, std::vector<Real>& values) const {
    const auto& s = case_.shape;
    const bool of_values = name == "v";
    const bool of_keys = name == "q" || name == "k" || name == "a" || name == "b" || name == "p";
    const std::int64_t heads = of_keys ? s.H : s.HV;
    const std::int64_t channels = name == "g" && case_.channel_gate() ? s.K : 1;
    const std::int64_t size = of_values ? s.V : of_keys ? s.K : channels;
    const auto dtype =
        sizeof(Real) == sizeof(double) ? core::DType::kFloat64 : core::DType::kFloat32;
    return {values.data(), dtype, s.T * heads * size, heads * size, size};
  }

  static core::ConstView as_const(const core::View& v) {
    return {v.data, v.dtype, v.batch_stride, v.time_stride, v.head_stride};
  }

  template <class Body>
  static void visit(core::RuleParams<Real>& p, const Body& body) {
    body("q", p.q), body("k", p.k), body("v", p.v), body("g", p.g), body("beta", p.beta);
    body("a", p.a), body("b", p.b), body("p", p.p), body("mu", p.mu), body("eta", p.eta);
  }
  template <class Body>
  static void visit(core::RuleGradients<Real>& d, const Body& body) {
    body("q", d.d_q), body("k", d.d_k), body("v", d.d_v), body("g", d.d_g), body("beta", d.d_beta);
    body("a", d.d_a), body("b", d.d_b), body("p", d.d_p), body("mu", d.d_mu);
    body("eta", d.d_eta);
  }

  const RuleCase& case_;
  Storage inputs_, gradients_;
  std::vector<Real> d_o_, d_state_, d_momentum_;
};

}  // namespace fastweights::test
