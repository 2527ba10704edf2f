// Gradients of windowed attention. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_SLIDING_WINDOW_ATTENTION_BACKWARD_INL_HPP_) == \
    defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_SLIDING_WINDOW_ATTENTION_BACKWARD_INL_HPP_
#undef FASTWEIGHTS_CORE_SLIDING_WINDOW_ATTENTION_BACKWARD_INL_HPP_
#else
#define FASTWEIGHTS_CORE_SLIDING_WINDOW_ATTENTION_BACKWARD_INL_HPP_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sliding_window_attention-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// From scores and the gradients `d` of the weights exp(score − log_sum), [rows, kQueries], to the
/// weights and the scores' gradients weight · (d − Σ weight · d), column by column.
template <class Real>
void softmax_gradient(std::int64_t rows, const Real* log_sums, Real* scores, Real* gradients) {
  const Tag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t column = 0; column < kQueries; column += lanes) {
    const auto log_sum = hn::Load(d, log_sums + column);
    auto mean = hn::Zero(d);
    for (std::int64_t row = 0; row < rows; ++row) {
      const auto at = row * kQueries + column;
      const auto weight = hn::Exp(d, hn::Sub(hn::Load(d, scores + at), log_sum));
      hn::Store(weight, d, scores + at);
      mean = hn::MulAdd(weight, hn::Load(d, gradients + at), mean);
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      const auto at = row * kQueries + column;
      const auto error = hn::Sub(hn::Load(d, gradients + at), mean);
      hn::Store(hn::Mul(hn::Load(d, scores + at), error), d, gradients + at);
    }
  }
}

/// Gradients of one row and head, segment by segment; those of keys and values are summed in rows
/// like a segment's and are complete when the queries of the next window − 1 tokens are through.
template <class Real>
class AttentionGradientHead {
 public:
  AttentionGradientHead(const AttentionHead<Real>& head, const AttentionGradients& gradients)
      : head_(head),
        g_(gradients),
        segment_(head),
        width_(segment_.width()),
        past_(segment_.past()),
        buffers_(width_, head.p.sinks + past_ + kQueries),
        d_out_(static_cast<std::size_t>(kQueries * width_)),
        d_out_t_(static_cast<std::size_t>(kQueries * width_)),
        d_scores_(static_cast<std::size_t>((head.p.sinks + past_ + kQueries) * kQueries)),
        d_rows_(static_cast<std::size_t>(2 * half())) {
    std::fill_n(d_rows_.data(), d_rows_.size(), Real{0});
  }

  /// Sums of the sinks' gradients, [sinks, width].
  const Real* d_sink_keys() const { return d_rows_.data(); }
  const Real* d_sink_values() const { return d_rows_.data() + half(); }

  void run() {
    const auto tokens = head_.p.tokens;
    segment_.load(0, -past_, 0);
    for (std::int64_t begin = 0; begin < tokens; begin += kSegment) {
      const auto end = std::min(tokens, begin + kSegment);
      segment_.load(begin, begin, end);
      for (auto first = begin; first < end; first += kQueries) {
        add_block(query_block(head_, first, end), first - begin);
      }
      store_rows(begin, end - begin);
      if (end == tokens) return flush(end);
      segment_.advance();
      advance();
    }
  }

 private:
  std::int64_t half() const { return (head_.p.sinks + past_ + kSegment) * width_; }
  Real* d_keys(std::int64_t row) { return d_rows_.data() + (head_.p.sinks + row) * width_; }
  Real* d_values(std::int64_t row) { return d_keys(row) + half(); }

  void add_block(const QueryBlock& block, std::int64_t local) {
    const auto& p = head_.p;
    load_block(
        block, width_, [&](std::int64_t t, Real* row) { head_.load_query(t, row); },
        buffers_.queries.data(), buffers_.queries_t.data());
    load_block(
        block, width_,
        [&](std::int64_t t, Real* row) {
          load_row(g_.d_o.at(head_.offset(t)), g_.d_o.dtype, p.size, row);
        },
        d_out_.data(), d_out_t_.data());
    score(segment_, block, p.sinks, p.size, local, buffers_.queries_t.data(),
          buffers_.scores.data());
    score_gradients(block, local);
    const auto first_row = local + block.begin_row;
    add_rows(block, buffers_.scores.data(), d_out_.data(), d_rows_.data() + half(),
             d_values(first_row));
    add_rows(block, d_scores_.data(), buffers_.queries.data(), d_rows_.data(), d_keys(first_row));
    store_query_gradients(block, local);
  }

  /// Turns scores into weights and forms their gradients.
  void score_gradients(const QueryBlock& block, std::int64_t local) {
    const auto& p = head_.p;
    const auto right = by_query(d_out_t_.data());
    multiply(p.sinks, p.size, kQueryPanels<Real>, {segment_.sink_values(), width_, 1}, right,
             Real{0}, by_query(d_scores_.data()));
    multiply(block.rows(), p.size, kQueryPanels<Real>,
             {segment_.values(local + block.begin_row), width_, 1}, right, Real{0},
             by_query(d_scores_.data() + p.sinks * kQueries));
    HWY_ALIGN Real log_sums[kQueries];
    load_log_sums(block, log_sums);
    softmax_gradient(p.sinks + block.rows(), log_sums, buffers_.scores.data(), d_scores_.data());
  }

  /// Queries that do not exist get weights of zero.
  void load_log_sums(const QueryBlock& block, Real* log_sums) const {
    const auto& from = head_.p.log_sum;
    std::fill_n(log_sums, kQueries, Real(1e30));
    for (std::int64_t i = 0; i < block.count; ++i) {
      log_sums[i] = load_scalar<Real>(from.at(head_.log_sum_offset(block.first + i)), from.dtype);
    }
  }

  /// sinks += left[sinks] · right and rows += left[rows] · right; left [keys, kQueries],
  /// right [kQueries, width].
  void add_rows(const QueryBlock& block, const Real* left, Real* right, Real* sinks, Real* rows) {
    const auto count = head_.p.sinks;
    const auto panels = width_ / kPanel<Real>;
    const auto operand = row_major(right, width_);
    multiply(count, kQueries, panels, {left, kQueries, 1}, operand, Real{1},
             row_major(sinks, width_));
    multiply(block.rows(), kQueries, panels, {left + count * kQueries, kQueries, 1}, operand,
             Real{1}, row_major(rows, width_));
  }

  void store_query_gradients(const QueryBlock& block, std::int64_t local) {
    const auto& p = head_.p;
    const auto out = by_query(buffers_.out_t.data());
    multiply(width_, p.sinks, kQueryPanels<Real>, {segment_.sink_keys(), 1, width_},
             by_query(d_scores_.data()), Real{0}, out);
    multiply(width_, block.rows(), kQueryPanels<Real>,
             {segment_.keys(local + block.begin_row), 1, width_},
             by_query(d_scores_.data() + p.sinks * kQueries), Real{1}, out);
    transpose(buffers_.out_t.data(), kQueries, width_, kQueries, buffers_.queries.data(), width_);
    for (std::int64_t i = 0; i < block.count; ++i) {
      Real* row = buffers_.queries.data() + i * width_;
      scale_row(row, head_.scale(), p.size, row);
      store_rotated_back(block.first + i, row, g_.d_query);
    }
  }

  void store_rotated_back(std::int64_t token, Real* row, const Array& to) {
    rotate_back(row, head_.table.at(head_.batch, token), head_.table.pairs());
    store_row(row, head_.p.size, to.at(head_.offset(token)), to.dtype);
  }

  /// Stores the gradients of the first `count` rows, which are complete; `begin` is the segment's.
  void store_rows(std::int64_t begin, std::int64_t count) {
    for (std::int64_t row = 0; row < count; ++row) {
      const auto token = begin - past_ + row;
      if (token >= 0) {
        store_rotated_back(token, d_keys(row), g_.d_key);
        store_row(d_values(row), head_.p.size, g_.d_value.at(head_.offset(token)),
                  g_.d_value.dtype);
      } else if (g_.d_cache_key && token >= head_.first_visible()) {
        const auto offset = head_.ring_offset(token);
        store_row(d_keys(row), head_.p.size, g_.d_cache_key.at(offset), g_.d_cache_key.dtype);
        store_row(d_values(row), head_.p.size, g_.d_cache_value.at(offset), g_.d_cache_value.dtype);
      }
    }
  }

  /// Stores what is left when all tokens are through: the last window − 1 rows.
  void flush(std::int64_t end) {
    const auto begin = (end - 1) / kSegment * kSegment;
    shift(end - begin);
    store_rows(end, past_);
  }

  void advance() {
    shift(kSegment);
    std::fill_n(d_keys(past_), kSegment * width_, Real{0});
    std::fill_n(d_values(past_), kSegment * width_, Real{0});
  }

  void shift(std::int64_t rows) {
    std::copy_n(d_keys(rows), past_ * width_, d_keys(0));
    std::copy_n(d_values(rows), past_ * width_, d_values(0));
  }

  const AttentionHead<Real>& head_;
  const AttentionGradients& g_;
  SegmentRows<Real> segment_;
  std::int64_t width_, past_;
  BlockBuffers<Real> buffers_;
  AlignedBuffer<Real> d_out_;     // [kQueries, width]
  AlignedBuffer<Real> d_out_t_;   // [width, kQueries]
  AlignedBuffer<Real> d_scores_;  // [sinks + past + kQueries, kQueries]
  AlignedBuffer<Real> d_rows_;    // sinks and rows of the keys' gradients, then of the values'
};

/// Sums the sinks' gradients, parts [batch, heads, 2, sinks, size], over the batch, in order.
template <class Real>
void store_sink_gradients(const AttentionParams& p, const AttentionGradients& g,
                          const std::vector<Real>& parts) {
  const auto part = p.sinks * p.size;
  const auto half = p.size / 2;
  std::vector<Real> sum(static_cast<std::size_t>(2 * part));
  for (std::int64_t head = 0; head < p.heads; ++head) {
    std::fill(sum.begin(), sum.end(), Real{0});
    for (std::int64_t b = 0; b < p.batch; ++b) {
      add_scaled_row(parts.data() + (b * p.heads + head) * 2 * part, Real{1}, 2 * part, sum.data());
    }
    for (std::int64_t sink = 0; sink < p.sinks; ++sink) {
      const auto index = head * p.sinks + sink;
      store_row(sum.data() + sink * p.size + half, half, g.d_sink_key.at(index * half),
                g.d_sink_key.dtype);
      store_row(sum.data() + part + sink * p.size, p.size, g.d_sink_value.at(index * p.size),
                g.d_sink_value.dtype);
    }
  }
}

template <class Real>
void attention_backward(const AttentionParams& p, const AttentionGradients& g,
                        const Executor& executor) {
  const RotaryTable<Real> table(p.position, p.batch, p.tokens, p.size, p.rope_base, executor);
  const auto part = p.sinks * p.size;
  std::vector<Real> parts(static_cast<std::size_t>(p.batch * p.heads * 2 * part), Real{0});
  executor.run(p.batch * p.heads, [&](std::int64_t task) {
    const AttentionHead<Real> head{p, table, task / p.heads, task % p.heads};
    AttentionGradientHead<Real> gradient(head, g);
    gradient.run();
    const auto width = round_up(p.size, kPanel<Real>);
    Real* out = parts.data() + task * 2 * part;
    for (std::int64_t sink = 0; sink < p.sinks; ++sink) {
      std::copy_n(gradient.d_sink_keys() + sink * width, p.size, out + sink * p.size);
      std::copy_n(gradient.d_sink_values() + sink * width, p.size, out + part + sink * p.size);
    }
  });
  store_sink_gradients(p, g, parts);
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
