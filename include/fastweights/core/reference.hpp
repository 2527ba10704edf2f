#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstdint>
#include <vector>

#include "fastweights/core/rule.hpp"

// The oracle: the delta rules as they are written down, token by token in fp64, forward and
// backward. Everything else in the library is tested against this or against its twin in Python.
// All views are fp64. Nothing here is fast, and nothing is shared with the kernels.

namespace fastweights::core::reference {

/// A state, [K, V].
using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// A key, query or value.
using RowVector = Eigen::VectorXd;

namespace detail {

inline RowVector row(const ConstView& view, std::int64_t b, std::int64_t t, std::int64_t h,
                     std::int64_t size) {
  return Eigen::Map<const RowVector>(static_cast<const double*>(view.at(b, t, h)), size);
}

inline double scalar(const ConstView& view, std::int64_t b, std::int64_t t, std::int64_t h) {
  return *static_cast<const double*>(view.at(b, t, h));
}

inline auto row(const View& view, std::int64_t b, std::int64_t t, std::int64_t h,
                std::int64_t size) {
  return Eigen::Map<RowVector>(static_cast<double*>(view.at(b, t, h)), size);
}

inline double inverse_norm(const RowVector& x) { return 1.0 / std::sqrt(x.squaredNorm() + 1e-6); }

/// One token of one head, normalised and scaled.
struct Token {
  RowVector q, k, v;
  double beta = 0;
  double decay = 1;
};

inline Token load(const RuleParams<double>& p, std::int64_t b, std::int64_t t, std::int64_t hv) {
  const std::int64_t h = hv / p.value_heads_per_key_head();
  Token token{row(p.q, b, t, h, p.shape.K), row(p.k, b, t, h, p.shape.K),
              row(p.v, b, t, hv, p.shape.V), scalar(p.beta, b, t, hv),
              p.g ? std::exp(scalar(p.g, b, t, hv)) : 1.0};
  if (p.use_qk_l2norm) {
    token.q *= inverse_norm(token.q);
    token.k *= inverse_norm(token.k);
  }
  token.q *= p.scale;
  return token;
}

inline Matrix initial_state(const double* states, std::int64_t offset, const Shape& shape) {
  if (states == nullptr) return Matrix::Zero(shape.K, shape.V);
  return Eigen::Map<const Matrix>(states + offset, shape.K, shape.V);
}

inline RowVector error(const Token& x, const Matrix& before) {
  return x.v - x.decay * before.transpose() * x.k;
}

/// dx of y = x · rsqrt(Σx² + ε).
inline RowVector normalisation_gradient(const RowVector& x, const RowVector& d_y) {
  const double r = inverse_norm(x);
  return r * (d_y - (r * r * x.dot(d_y)) * x);
}

}  // namespace detail

/// The rule of `params` (gated when it has g), writing o and, if not null, final_state.
inline void forward(const RuleParams<double>& p) {
  for (std::int64_t n = 0; n < p.sequences(); ++n) {
    const Sequence sequence = p.sequence(n);
    for (std::int64_t hv = 0; hv < p.shape.HV; ++hv) {
      const std::int64_t offset = p.state_offset(n, hv);
      Matrix state = detail::initial_state(p.initial_state, offset, p.shape);
      for (std::int64_t t = sequence.begin; t < sequence.begin + sequence.length; ++t) {
        const auto x = detail::load(p, sequence.batch, t, hv);
        const RowVector write = x.beta * detail::error(x, state);
        state = x.decay * state + x.k * write.transpose();
        detail::row(p.o, sequence.batch, t, hv, p.shape.V) = state.transpose() * x.q;
      }
      if (p.final_state != nullptr) {
        Eigen::Map<Matrix>(p.final_state + offset, p.shape.K, p.shape.V) = state;
      }
    }
  }
}

namespace detail {

/// Gradients of one token, from that of the state after it to that of the state before it.
inline void backward_token(const RuleParams<double>& p, const RuleGradients<double>& d,
                           std::int64_t b, std::int64_t t, std::int64_t hv, const Matrix& before,
                           const Matrix& after, Matrix& d_state) {
  const auto x = load(p, b, t, hv);
  const std::int64_t h = hv / p.value_heads_per_key_head();
  const RowVector e = error(x, before);
  const RowVector d_o = d.d_o ? row(d.d_o, b, t, hv, p.shape.V) : RowVector::Zero(p.shape.V);
  d_state += x.q * d_o.transpose();
  const RowVector d_write = d_state.transpose() * x.k;
  const RowVector d_error = x.beta * d_write;
  RowVector d_q = p.scale * (after * d_o);
  RowVector d_k = x.beta * (d_state * e) - x.decay * (before * d_error);
  const double d_decay = (d_state.array() * before.array()).sum() - x.k.dot(before * d_error);
  if (p.use_qk_l2norm) {
    d_q = normalisation_gradient(row(p.q, b, t, h, p.shape.K), d_q);
    d_k = normalisation_gradient(row(p.k, b, t, h, p.shape.K), d_k);
  }
  row(d.d_q, b, t, h, p.shape.K) += d_q;
  row(d.d_k, b, t, h, p.shape.K) += d_k;
  row(d.d_v, b, t, hv, p.shape.V) = d_error;
  row(d.d_beta, b, t, hv, 1)[0] = d_write.dot(e);
  if (d.d_g) row(d.d_g, b, t, hv, 1)[0] = x.decay * d_decay;
  d_state = x.decay * (d_state - x.k * d_error.transpose());
}

}  // namespace detail

/// Gradients of `forward`. d_q and d_k are added to, since value heads share them; clear them
/// first.
inline void backward(const RuleParams<double>& p, const RuleGradients<double>& d) {
  for (std::int64_t n = 0; n < p.sequences(); ++n) {
    const Sequence sequence = p.sequence(n);
    for (std::int64_t hv = 0; hv < p.shape.HV; ++hv) {
      const std::int64_t offset = p.state_offset(n, hv);
      std::vector<Matrix> states{detail::initial_state(p.initial_state, offset, p.shape)};
      for (std::int64_t i = 0; i < sequence.length; ++i) {
        const auto x = detail::load(p, sequence.batch, sequence.begin + i, hv);
        const RowVector write = x.beta * detail::error(x, states.back());
        states.push_back(x.decay * states.back() + x.k * write.transpose());
      }
      Matrix d_state = detail::initial_state(d.d_final_state, offset, p.shape);
      for (std::int64_t i = sequence.length - 1; i >= 0; --i) {
        const auto index = static_cast<std::size_t>(i);
        detail::backward_token(p, d, sequence.batch, sequence.begin + i, hv, states[index],
                               states[index + 1], d_state);
      }
      if (d.d_initial_state != nullptr) {
        Eigen::Map<Matrix>(d.d_initial_state + offset, p.shape.K, p.shape.V) = d_state;
      }
    }
  }
}

}  // namespace fastweights::core::reference
