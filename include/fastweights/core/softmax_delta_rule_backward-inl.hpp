// Gradients of the softmax delta rule, chunk by chunk from the last one: the formulas are in
// docs/softmax_delta_rule.md. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_SOFTMAX_DELTA_RULE_BACKWARD_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_SOFTMAX_DELTA_RULE_BACKWARD_INL_HPP_
#undef FASTWEIGHTS_CORE_SOFTMAX_DELTA_RULE_BACKWARD_INL_HPP_
#else
#define FASTWEIGHTS_CORE_SOFTMAX_DELTA_RULE_BACKWARD_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fastweights/core/softmax_delta_rule-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace softmax_delta {

/// A number for each pair of tokens of a chunk.
template <class Real>
using Pairs = std::array<std::array<Real, kTokens>, kTokens>;

/// Element (to, from): the decays between two tokens, without both, for from < to.
inline Pairs<double> decays_between(const Scalars& s, int count) {
  Pairs<double> between{};
  for (int from = 0; from < count; ++from) {
    double product = 1.0;
    for (int to = from + 1; to < count; ++to) {
      const auto i = static_cast<std::size_t>(to);
      between[i][static_cast<std::size_t>(from)] = product;
      product *= s.decay[i];
    }
  }
  return between;
}

/// The gradients of one row of a batch. `d_state` is the gradient of the state behind the chunk,
/// then of the one before it.
template <class Real>
class GradientWalk {
 public:
  using Params = SoftmaxDeltaRuleParams<Real>;
  using Gradients = SoftmaxDeltaRuleGradients<Real>;

  GradientWalk(const Params& params, const Gradients& gradients, std::int64_t row)
      : p_(params),
        g_(gradients),
        row_(row),
        hidden_(tokens_of(params.D)),
        scaled_(tokens_of(params.D)),
        errors_(tokens_of(params.N)),
        d_logits_(tokens_of(params.N)),
        recalled_(tokens_of(params.N)),
        written_(tokens_of(params.D)),
        read_(tokens_of(params.D)),
        products_(static_cast<std::size_t>(divide_up(params.D, kRows))) {}

  /// States are kept at every √n-th chunk and recomputed from there.
  void run(Real* d_state, Team& team) {
    const auto chunks = chunks_of(p_);
    const auto count = static_cast<std::int64_t>(chunks.size());
    const auto span = static_cast<std::int64_t>(std::ceil(std::sqrt(static_cast<double>(count))));
    auto marks = keep_states(chunks, span, team);
    std::vector<AlignedBuffer<Real>> states;
    for (std::int64_t i = 1; i < span; ++i) states.push_back(new_state());
    for (auto mark = static_cast<std::int64_t>(marks.size()) - 1; mark >= 0; --mark) {
      const auto begin = mark * span;
      const auto end = std::min(count, begin + span);
      const auto before = [&](std::int64_t i) {
        return i == begin ? marks[static_cast<std::size_t>(mark)].data()
                          : states[static_cast<std::size_t>(i - begin - 1)].data();
      };
      for (auto i = begin; i + 1 < end; ++i) {
        load(chunks[static_cast<std::size_t>(i)]);
        advance(before(i), before(i + 1), team);
      }
      for (auto i = end - 1; i >= begin; --i) {
        differentiate(chunks[static_cast<std::size_t>(i)], before(i), d_state, team);
      }
      marks.pop_back();
    }
  }

 private:
  static std::size_t tokens_of(std::int64_t size) {
    return static_cast<std::size_t>(kTokens * size);
  }
  AlignedBuffer<Real> new_state() const {
    return AlignedBuffer<Real>(static_cast<std::size_t>(p_.D * p_.N));
  }
  std::int64_t token(const Chunk& chunk, std::int64_t t) const {
    return row_ * p_.T + chunk.begin + t;
  }

  /// The states before the chunks 0, span, 2 · span, …
  std::vector<AlignedBuffer<Real>> keep_states(const std::vector<Chunk>& chunks, std::int64_t span,
                                               Team& team) {
    std::vector<AlignedBuffer<Real>> marks;
    if (chunks.empty()) return marks;
    marks.push_back(new_state());
    if (p_.initial_state == nullptr) {
      std::fill_n(marks[0].data(), p_.D * p_.N, Real{0});
    } else {
      std::copy_n(p_.initial_state + row_ * p_.D * p_.N, p_.D * p_.N, marks[0].data());
    }
    const auto last = (static_cast<std::int64_t>(chunks.size()) - 1) / span * span;
    for (std::int64_t i = 0; i < last; ++i) {
      if (i % span == 0) marks.push_back(new_state());
      Real* from = i % span == 0 ? marks[marks.size() - 2].data() : marks.back().data();
      load(chunks[static_cast<std::size_t>(i)]);
      advance(from, marks.back().data(), team);
    }
    return marks;
  }

  /// Loads hidden states, and the errors of the tokens that have a target.
  void load(const Chunk& chunk) {
    scalars_ = load_scalars(p_, row_, chunk);
    writers_ = 0;
    for (int t = 0; t < chunk.count; ++t) {
      const auto i = static_cast<std::size_t>(t);
      Real* row = hidden_.data() + t * p_.D;
      load_row(p_.h.at(token(chunk, t) * p_.D), p_.h.dtype, p_.D, row);
      inverse_norm_[i] = inverse_norm(row, p_.D);
      scale_row(row, inverse_norm_[i], p_.D, row);
      if (!scalars_.known[i]) continue;
      Real* logits = recalled_.data();
      load_row(p_.corrected.at(token(chunk, t) * p_.N), p_.corrected.dtype, p_.N, logits);
      prediction_error(logits, p_.target[token(chunk, t)], p_.N, errors_.data() + writers_ * p_.N);
      tokens_[static_cast<std::size_t>(writers_++)] = t;
    }
  }

  /// scaled ← the hidden states of the writers times `factor(token)`.
  template <class Factor>
  void scale_writers(const Factor& factor) {
    for (int w = 0; w < writers_; ++w) {
      const auto t = tokens_[static_cast<std::size_t>(w)];
      scale_row(hidden_.data() + t * p_.D, static_cast<Real>(factor(static_cast<std::size_t>(t))),
                p_.D, scaled_.data() + w * p_.D);
    }
  }

  template <class Body>
  void for_columns(Team& team, const Body& body) const {
    team.loop(divide_up(p_.N, kColumns), [&](std::int64_t task) {
      body(task * kColumns, std::min(p_.N, (task + 1) * kColumns));
    });
  }

  /// The state behind the chunk from the one before it.
  void advance(const Real* from, Real* to, Team& team) {
    scale_writers([&](std::size_t t) { return scalars_.after[t] * scalars_.eta[t]; });
    add_outer_products(from, to, errors_.data(), writers_, team);
  }

  /// to ← decay of the chunk · from + Σ scaled rowᵀ · row of `right`
  void add_outer_products(const Real* from, Real* to, const Real* right, int count, Team& team) {
    for_columns(team, [&](std::int64_t begin, std::int64_t end) {
      multiply<Real>({.rows = p_.D,
                      .inner = count,
                      .left = scaled_.data(),
                      .left_row = 1,
                      .left_inner = p_.D,
                      .right = right,
                      .right_stride = p_.N,
                      .base = from,
                      .base_stride = p_.N,
                      .shrink = static_cast<Real>(scalars_.shrink),
                      .out = to,
                      .out_stride = p_.N},
                     begin, end);
    });
  }

  void differentiate(const Chunk& chunk, const Real* state, Real* d_state, Team& team) {
    load(chunk);
    between_ = decays_between(scalars_, chunk.count);
    multiply_transposed(hidden_.data(), chunk.count, p_.D, hidden_.data(), chunk.count, p_.D, p_.D,
                        hidden_products_[0].data(), kTokens);
    load_d_logits(chunk);
    recall(d_state, team);
    for (int w = writers_, t = chunk.count - 1; t >= 0; --t) {
      d_eta_[static_cast<std::size_t>(t)] = Real{0};
      if (scalars_.known[static_cast<std::size_t>(t)]) differentiate_error(chunk, t, --w);
    }
    store(chunk, d_logits_.data(), p_.N, g_.d_logits);
    multiply_transposed(d_logits_.data(), chunk.count, p_.N, errors_.data(), writers_, p_.N, p_.N,
                        error_products_[0].data(), kTokens);
    sum_columns(chunk, state, d_state, team);
    if (p_.g) store_d_g(chunk);
    for (int t = 0; t < chunk.count; ++t) {
      const auto& d_eta = d_eta_[static_cast<std::size_t>(t)];
      store_row(&d_eta, 1, g_.d_eta.at(token(chunk, t)), g_.d_eta.dtype);
    }
    store_d_hidden(chunk);
    move_back(chunk, d_state, team);
  }

  void load_d_logits(const Chunk& chunk) {
    for (int t = 0; t < chunk.count; ++t) {
      Real* row = d_logits_.data() + t * p_.N;
      if (g_.d_corrected) {
        load_row(g_.d_corrected.at(token(chunk, t) * p_.N), g_.d_corrected.dtype, p_.N, row);
      } else {
        std::fill_n(row, p_.N, Real{0});
      }
    }
  }

  /// recalled ← what the gradient of the state behind the chunk holds for each writer.
  void recall(const Real* d_state, Team& team) {
    scale_writers([&](std::size_t t) { return scalars_.after[t]; });
    for_columns(team, [&](std::int64_t begin, std::int64_t end) {
      multiply<Real>({.rows = writers_,
                      .inner = p_.D,
                      .left = scaled_.data(),
                      .left_row = p_.D,
                      .left_inner = 1,
                      .right = d_state,
                      .right_stride = p_.N,
                      .out = recalled_.data(),
                      .out_stride = p_.N},
                     begin, end);
    });
  }

  /// Writer `w`, token `t`: from the gradient of its write to those of its strength and, through
  /// the softmax, of its logits. The later tokens of the chunk have theirs already.
  void differentiate_error(const Chunk& chunk, int t, int w) {
    const auto i = static_cast<std::size_t>(t);
    HWY_ALIGN Real factors[kTokens];
    for (int later = t + 1; later < chunk.count; ++later) {
      const auto k = static_cast<std::size_t>(later);
      factors[later - t - 1] = static_cast<Real>(between_[k][i]) * hidden_products_[k][i];
    }
    Real* d_write = recalled_.data() + w * p_.N;
    multiply<Real>({.rows = 1,
                    .inner = chunk.count - 1 - t,
                    .left = factors,
                    .left_row = kTokens,
                    .left_inner = 1,
                    .right = d_logits_.data() + (t + 1) * p_.N,
                    .right_stride = p_.N,
                    .base = d_write,
                    .base_stride = p_.N,
                    .out = d_write,
                    .out_stride = p_.N},
                   0, p_.N);
    const Real* error = errors_.data() + w * p_.N;
    Real* d_logits = d_logits_.data() + t * p_.N;
    const auto target = p_.target[token(chunk, t)];
    d_eta_[i] = dot(d_write, error, p_.N);
    const Real mean = d_write[target] - d_eta_[i];  // of d_write under the prediction
    const auto eta = static_cast<Real>(scalars_.eta[i]);
    add_centred(d_write, mean, error, eta, d_logits);
    d_logits[target] -= eta * (d_write[target] - mean);
  }

  /// out ← out + factor · weight ⊙ (row − mean)
  void add_centred(const Real* row, Real mean, const Real* weight, Real factor, Real* out) const {
    const hn::ScalableTag<Real> d;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    const auto run = [&](auto tag, std::int64_t i) HWY_ATTR {
      const auto centred = hn::Sub(hn::LoadU(tag, row + i), hn::Set(tag, mean));
      const auto share = hn::Mul(hn::Set(tag, factor), hn::LoadU(tag, weight + i));
      hn::StoreU(hn::MulAdd(share, centred, hn::LoadU(tag, out + i)), tag, out + i);
    };
    std::int64_t i = 0;
    for (; i + lanes <= p_.N; i += lanes) run(d, i);
    for (; i < p_.N; ++i) run(hn::CappedTag<Real, 1>(), i);
  }

  /// The products that sum over columns: written ← errors · d_stateᵀ, read ← d_logits · stateᵀ, and
  /// the product of the two states.
  void sum_columns(const Chunk& chunk, const Real* state, const Real* d_state, Team& team) {
    team.loop(divide_up(p_.D, kRows), [&](std::int64_t task) {
      const auto begin = task * kRows;
      const auto rows = std::min(kRows, p_.D - begin);
      const auto offset = begin * p_.N;
      multiply_transposed(errors_.data(), writers_, p_.N, d_state + offset, rows, p_.N, p_.N,
                          written_.data() + begin, p_.D);
      if (chunk.reads) {
        multiply_transposed(d_logits_.data(), chunk.count, p_.N, state + offset, rows, p_.N, p_.N,
                            read_.data() + begin, p_.D);
      }
      if (!p_.g) return;
      double sum = 0.0;
      for (std::int64_t r = 0; r < rows; ++r) {
        sum += dot(state + offset + r * p_.N, d_state + offset + r * p_.N, p_.N);
      }
      products_[static_cast<std::size_t>(task)] = sum;
    });
  }

  /// The gradient of a decay sums all that it lies between: a write and a read, a state and a read,
  /// a write and the gradient behind the chunk, both states. Each term has the decay in it, so that
  /// one that forgets everything has a gradient of zero.
  void store_d_g(const Chunk& chunk) {
    double states = 0.0;
    for (const double product : products_.span()) states += product;
    for (int t = 0; t < chunk.count; ++t) {
      const auto i = static_cast<std::size_t>(t);
      double sum = scalars_.known[i] ? (1.0 + scalars_.shrink) * states : 0.0;
      for (int w = 0; w < writers_ && scalars_.known[i]; ++w) {
        if (tokens_[static_cast<std::size_t>(w)] < t) sum += d_of_write(chunk, w, t);
      }
      for (int later = t + 1; later < chunk.count && scalars_.known[i]; ++later) {
        sum += scalars_.before[static_cast<std::size_t>(later)] *
               dot(hidden_.data() + later * p_.D, read_.data() + later * p_.D, p_.D);
      }
      const auto d_g = static_cast<Real>(sum);
      store_row(&d_g, 1, g_.d_g.at(token(chunk, t)), g_.d_g.dtype);
    }
  }

  /// What write `w` adds to the gradient of the decay of the later token `t`.
  double d_of_write(const Chunk& chunk, int w, int t) const {
    const auto from = static_cast<std::size_t>(tokens_[static_cast<std::size_t>(w)]);
    const auto at = static_cast<std::int64_t>(from) * p_.D;
    double sum = scalars_.after[from] * dot(hidden_.data() + at, written_.data() + w * p_.D, p_.D);
    for (int later = t + 1; later < chunk.count; ++later) {
      const auto k = static_cast<std::size_t>(later);
      sum += between_[k][from] * hidden_products_[k][from] *
             error_products_[k][static_cast<std::size_t>(w)];
    }
    return scalars_.eta[from] * sum;
  }

  void store_d_hidden(const Chunk& chunk) {
    const Pairs<Real> factors = factors_of_hidden(chunk);
    AlignedBuffer<Real> row(static_cast<std::size_t>(p_.D));
    for (int t = 0, w = 0; t < chunk.count; ++t) {
      const auto i = static_cast<std::size_t>(t);
      std::fill_n(row.data(), p_.D, Real{0});
      if (scalars_.known[i]) {
        const auto factor = static_cast<Real>(scalars_.eta[i] * scalars_.after[i]);
        add_scaled_row(written_.data() + w++ * p_.D, factor, p_.D, row.data());
      }
      if (chunk.reads) {
        add_scaled_row(read_.data() + t * p_.D, static_cast<Real>(scalars_.before[i]), p_.D,
                       row.data());
      }
      for (int other = 0; other < chunk.count; ++other) {
        const Real factor = factors[i][static_cast<std::size_t>(other)];
        if (factor != Real{0}) {
          add_scaled_row(hidden_.data() + other * p_.D, factor, p_.D, row.data());
        }
      }
      const Real* hidden = hidden_.data() + t * p_.D;
      add_scaled_row(hidden, -dot(hidden, row.data(), p_.D), p_.D, row.data());
      scale_row(row.data(), inverse_norm_[i], p_.D, row.data());
      store_row(row.data(), p_.D, g_.d_h.at(token(chunk, t) * p_.D), g_.d_h.dtype);
    }
  }

  /// Element (t, j): how much of token j's hidden state the gradient of token t's holds, from the
  /// writes of one that the other reads.
  Pairs<Real> factors_of_hidden(const Chunk& chunk) const {
    Pairs<Real> factors{};
    for (int w = 0; w < writers_; ++w) {
      const auto from = static_cast<std::size_t>(tokens_[static_cast<std::size_t>(w)]);
      for (auto to = from + 1; to < static_cast<std::size_t>(chunk.count); ++to) {
        factors[from][to] = factors[to][from] =
            static_cast<Real>(scalars_.eta[from] * between_[to][from] *
                              error_products_[to][static_cast<std::size_t>(w)]);
      }
    }
    return factors;
  }

  /// d_state: from behind the chunk to before it.
  void move_back(const Chunk& chunk, Real* d_state, Team& team) {
    for (int t = 0; t < chunk.count; ++t) {
      scale_row(hidden_.data() + t * p_.D,
                static_cast<Real>(scalars_.before[static_cast<std::size_t>(t)]), p_.D,
                scaled_.data() + t * p_.D);
    }
    add_outer_products(d_state, d_state, d_logits_.data(), chunk.reads ? chunk.count : 0, team);
  }

  void store(const Chunk& chunk, const Real* rows, std::int64_t size, const Array& to) const {
    for (int t = 0; t < chunk.count; ++t) {
      store_row(rows + t * size, size, to.at(token(chunk, t) * size), to.dtype);
    }
  }

  const Params& p_;
  const Gradients& g_;
  std::int64_t row_;
  AlignedBuffer<Real> hidden_;    // [kTokens, D], normalised
  AlignedBuffer<Real> scaled_;    // [kTokens, D], the same times numbers
  AlignedBuffer<Real> errors_;    // [kTokens, N], of each writer
  AlignedBuffer<Real> d_logits_;  // [kTokens, N]
  AlignedBuffer<Real> recalled_;  // [kTokens, N], of each writer
  AlignedBuffer<Real> written_;   // [kTokens, D], of each writer
  AlignedBuffer<Real> read_;      // [kTokens, D]
  AlignedBuffer<double> products_;
  Scalars scalars_;
  Pairs<double> between_{};
  Pairs<Real> hidden_products_{};
  Pairs<Real> error_products_{};
  std::array<Real, kTokens> inverse_norm_{};
  std::array<Real, kTokens> d_eta_{};
  std::array<int, kTokens> tokens_{};  // of each writer
  int writers_ = 0;
};

template <class Real>
void backward(const SoftmaxDeltaRuleParams<Real>& p, const SoftmaxDeltaRuleGradients<Real>& g,
              const Executor& executor) {
  const auto size = p.D * p.N;
  for_each_row(p, executor, [&](std::int64_t row, Team& team) {
    Real* d_state = g.d_initial_state + row * size;
    if (g.d_final_state == nullptr) {
      std::fill_n(d_state, size, Real{0});
    } else {
      std::copy_n(g.d_final_state + row * size, size, d_state);
    }
    GradientWalk<Real>(p, g, row).run(d_state, team);
  });
}

}  // namespace softmax_delta

template <class Real>
SoftmaxDeltaRuleForms<Real> softmax_delta_rule_forms() {
  return {&softmax_delta::forward<Real>, &softmax_delta::backward<Real>};
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
