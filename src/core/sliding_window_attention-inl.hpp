// Windowed attention. Per-target include guard.
//
// Scores are kept transposed, [keys, queries], for kQueries queries at a time: vectors run along
// the queries, so that the softmax needs no sums across a vector and the products read keys and
// values where they lie.
#if defined(FASTWEIGHTS_CORE_SLIDING_WINDOW_ATTENTION_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_SLIDING_WINDOW_ATTENTION_INL_HPP_
#undef FASTWEIGHTS_CORE_SLIDING_WINDOW_ATTENTION_INL_HPP_
#else
#define FASTWEIGHTS_CORE_SLIDING_WINDOW_ATTENTION_INL_HPP_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/matrix-inl.hpp"
#include "fastweights/core/rows-inl.hpp"
#include "fastweights/core/sliding_window_attention.hpp"
#include "rotary-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

using AttentionParams = cpu::SlidingWindowAttentionParams;
using AttentionGradients = cpu::SlidingWindowAttentionGradients;

/// Queries of one block of scores.
inline constexpr std::int64_t kQueries = 32;
/// Queries of one segment, whose keys and values stay in L2.
inline constexpr std::int64_t kSegment = 256;
/// Up to this many tokens each query is taken by itself.
inline constexpr std::int64_t kFewTokens = 4;

/// One row and head of a call: where its tokens lie. Token t < 0 is one of the ring's.
template <class Real>
struct AttentionHead {
  const AttentionParams& p;
  const RotaryTable<Real>& table;
  std::int64_t batch;
  std::int64_t head;

  std::int64_t offset(std::int64_t token) const {
    return ((batch * p.tokens + token) * p.heads + head) * p.size;
  }
  std::int64_t ring_offset(std::int64_t token) const {
    const auto slot = (p.position[batch] + token) % p.window;
    return ((batch * p.window + slot) * p.heads + head) * p.size;
  }
  std::int64_t log_sum_offset(std::int64_t token) const {
    return (batch * p.heads + head) * p.tokens + token;
  }
  /// The first token that the first one can see.
  std::int64_t first_visible() const {
    return p.cache_key ? -std::min(p.position[batch], p.window - 1) : 0;
  }
  Real scale() const { return static_cast<Real>(1.0 / std::sqrt(static_cast<double>(p.size))); }

  void load_query(std::int64_t token, Real* out) const {
    load_row(p.query.at(offset(token)), p.query.dtype, p.size, out);
    rotate(out, table.at(batch, token), table.pairs());
    scale_row(out, scale(), p.size, out);
  }
  void load_key(std::int64_t token, Real* out) const {
    if (token < 0)
      return load_row(p.cache_key.at(ring_offset(token)), p.cache_key.dtype, p.size, out);
    load_row(p.key.at(offset(token)), p.key.dtype, p.size, out);
    rotate(out, table.at(batch, token), table.pairs());
  }
  void load_value(std::int64_t token, Real* out) const {
    const auto& from = token < 0 ? p.cache_value : p.value;
    load_row(from.at(token < 0 ? ring_offset(token) : offset(token)), from.dtype, p.size, out);
  }
  /// A sink's key; the rotated half is zero.
  void load_sink(std::int64_t sink, Real* key, Real* value) const {
    const auto index = head * p.sinks + sink;
    const auto half = p.size / 2;
    std::fill_n(key, half, Real{0});
    load_row(p.sink_key.at(index * half), p.sink_key.dtype, half, key + half);
    load_row(p.sink_value.at(index * p.size), p.sink_value.dtype, p.size, value);
  }
};

/// Keys and values of the sinks, a segment's tokens and the window − 1 tokens before it, as rows of
/// `width` elements, a multiple of a panel; what lies behind `size` is zero.
template <class Real>
class SegmentRows {
 public:
  explicit SegmentRows(const AttentionHead<Real>& head)
      : head_(head),
        width_(round_up(head.p.size, kPanel<Real>)),
        past_(head.p.window - 1),
        data_(static_cast<std::size_t>(2 * (head.p.sinks + past_ + kSegment) * width_)) {
    // Rows are read only where they were loaded: what has to be zero is what lies behind `size`.
    if (width_ != head.p.size) std::fill_n(data_.data(), data_.size(), Real{0});
    for (std::int64_t sink = 0; sink < head.p.sinks; ++sink) {
      head.load_sink(sink, sink_keys() + sink * width_, sink_values() + sink * width_);
    }
  }

  std::int64_t width() const { return width_; }
  std::int64_t past() const { return past_; }
  Real* sink_keys() { return data_.data(); }
  Real* sink_values() { return data_.data() + half(); }
  /// Row `row` is token `begin − past + row`.
  Real* keys(std::int64_t row) { return sink_keys() + (head_.p.sinks + row) * width_; }
  Real* values(std::int64_t row) { return sink_values() + (head_.p.sinks + row) * width_; }

  /// Loads the tokens `first … last − 1` of the segment that starts at `begin`.
  void load(std::int64_t begin, std::int64_t first, std::int64_t last) {
    for (auto token = std::max(first, head_.first_visible()); token < last; ++token) {
      head_.load_key(token, keys(token - begin + past_));
      head_.load_value(token, values(token - begin + past_));
    }
  }

  /// Moves the last `past` tokens of a segment of kSegment tokens before the next one.
  void advance() {
    std::copy_n(keys(kSegment), past_ * width_, keys(0));
    std::copy_n(values(kSegment), past_ * width_, values(0));
  }

 private:
  std::int64_t half() const { return (head_.p.sinks + past_ + kSegment) * width_; }

  const AttentionHead<Real>& head_;
  std::int64_t width_, past_;
  AlignedBuffer<Real> data_;
};

/// Up to kQueries queries from token `first`, and the range of key rows that they see: row r is the
/// token first − past + r; query i sees rows i … i + past.
struct QueryBlock {
  std::int64_t first;
  std::int64_t count;
  std::int64_t begin_row;
  std::int64_t end_row;

  std::int64_t rows() const { return end_row - begin_row; }
};

template <class Real>
QueryBlock query_block(const AttentionHead<Real>& head, std::int64_t first, std::int64_t end) {
  const auto count = std::min(kQueries, end - first);
  const auto past = head.p.window - 1;
  const auto begin = std::max<std::int64_t>(0, head.first_visible() - (first - past));
  return {first, count, begin, past + count};
}

/// A [rows, kQueries] matrix as an operand.
template <class Real>
Panels<Real> by_query(Real* data) {
  return row_major(data, kQueries);
}

template <class Real>
inline constexpr std::int64_t kQueryPanels = kQueries / kPanel<Real>;

/// Hides what a query does not see. `scores` holds the rows of `block`, [rows, kQueries].
template <class Real>
void hide_scores(const QueryBlock& block, std::int64_t past, Real* scores) {
  constexpr Real kHidden = Real(-1e30);
  for (auto row = block.begin_row; row < block.end_row; ++row) {
    Real* line = scores + (row - block.begin_row) * kQueries;
    for (auto i = row + 1; i < kQueries; ++i) line[i] = kHidden;
    const auto hidden = std::min(row - past, kQueries);
    for (std::int64_t i = 0; i < hidden; ++i) line[i] = kHidden;
  }
}

/// scores ← [sinks; keys] · queriesᵀ, [sinks + rows, kQueries], with what is not seen hidden.
template <class Real>
void score(SegmentRows<Real>& segment, const QueryBlock& block, std::int64_t sinks,
           std::int64_t size, std::int64_t local, Real* queries, Real* scores) {
  const auto width = segment.width();
  const auto right = by_query(queries);
  multiply(sinks, size, kQueryPanels<Real>, {segment.sink_keys(), width, 1}, right, Real{0},
           by_query(scores));
  Real* seen = scores + sinks * kQueries;
  multiply(block.rows(), size, kQueryPanels<Real>,
           {segment.keys(local + block.begin_row), width, 1}, right, Real{0}, by_query(seen));
  hide_scores(block, segment.past(), seen);
}

/// Replaces scores [rows, kQueries] by exp(score − max), column by column; fills the sums and the
/// logarithms of the softmax's sums.
template <class Real>
void softmax(std::int64_t rows, Real* scores, Real* sums, Real* log_sums) {
  const Tag<Real> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t column = 0; column < kQueries; column += lanes) {
    auto largest = hn::Set(d, std::numeric_limits<Real>::lowest());
    for (std::int64_t row = 0; row < rows; ++row) {
      largest = hn::Max(largest, hn::Load(d, scores + row * kQueries + column));
    }
    auto sum = hn::Zero(d);
    for (std::int64_t row = 0; row < rows; ++row) {
      Real* at = scores + row * kQueries + column;
      const auto weight = hn::Exp(d, hn::Sub(hn::Load(d, at), largest));
      hn::Store(weight, d, at);
      sum = hn::Add(sum, weight);
    }
    hn::Store(sum, d, sums + column);
    hn::Store(hn::Add(largest, hn::Log(d, sum)), d, log_sums + column);
  }
}

/// Buffers of one block of queries.
template <class Real>
struct BlockBuffers {
  BlockBuffers(std::int64_t width, std::int64_t rows)
      : queries(size(kQueries * width)),
        queries_t(size(width * kQueries)),
        scores(size(rows * kQueries)),
        out_t(size(width * kQueries)) {}

  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

  AlignedBuffer<Real> queries;    // [kQueries, width]
  AlignedBuffer<Real> queries_t;  // [width, kQueries]
  AlignedBuffer<Real> scores;     // [rows, kQueries]
  AlignedBuffer<Real> out_t;      // [width, kQueries]
};

/// Fills `rows` and its transpose with `load(token, row)` of the block's queries, zeros after them.
template <class Real, class Load>
void load_block(const QueryBlock& block, std::int64_t width, const Load& load, Real* rows,
                Real* transposed) {
  std::fill_n(rows, kQueries * width, Real{0});
  for (std::int64_t i = 0; i < block.count; ++i) load(block.first + i, rows + i * width);
  transpose(rows, width, kQueries, width, transposed, kQueries);
}

template <class Real>
void store_outputs(const AttentionHead<Real>& head, const QueryBlock& block, std::int64_t width,
                   const Real* sums, const Real* log_sums, BlockBuffers<Real>& buffers) {
  transpose(buffers.out_t.data(), kQueries, width, kQueries, buffers.queries.data(), width);
  for (std::int64_t i = 0; i < block.count; ++i) {
    Real* row = buffers.queries.data() + i * width;
    const auto token = block.first + i;
    scale_row(row, Real{1} / sums[i], head.p.size, row);
    store_row(row, head.p.size, head.p.o.at(head.offset(token)), head.p.o.dtype);
    store_row(log_sums + i, 1, head.p.log_sum.at(head.log_sum_offset(token)), head.p.log_sum.dtype);
  }
}

/// The tokens `begin … end − 1` of one row and head.
template <class Real>
void attend_segment(const AttentionHead<Real>& head, std::int64_t begin, std::int64_t end) {
  const auto& p = head.p;
  SegmentRows<Real> segment(head);
  segment.load(begin, begin - segment.past(), end);
  const auto width = segment.width();
  BlockBuffers<Real> buffers(width, p.sinks + segment.past() + kQueries);
  HWY_ALIGN Real sums[kQueries];
  HWY_ALIGN Real log_sums[kQueries];
  for (auto first = begin; first < end; first += kQueries) {
    const auto block = query_block(head, first, end);
    const auto local = first - begin;
    load_block(
        block, width, [&](std::int64_t t, Real* row) { head.load_query(t, row); },
        buffers.queries.data(), buffers.queries_t.data());
    Real* scores = buffers.scores.data();
    score(segment, block, p.sinks, p.size, local, buffers.queries_t.data(), scores);
    softmax(p.sinks + block.rows(), scores, sums, log_sums);
    const auto out = by_query(buffers.out_t.data());
    multiply(width, p.sinks, kQueryPanels<Real>, {segment.sink_values(), 1, width},
             by_query(scores), Real{0}, out);
    multiply(width, block.rows(), kQueryPanels<Real>,
             {segment.values(local + block.begin_row), 1, width},
             by_query(scores + p.sinks * kQueries), Real{1}, out);
    store_outputs(head, block, width, sums, log_sums, buffers);
  }
}

/// One query by itself: no blocks to fill.
template <class Real>
void attend_token(const AttentionHead<Real>& head, std::int64_t token) {
  const auto& p = head.p;
  const auto first = std::max(token - p.window + 1, head.first_visible());
  const auto count = p.sinks + token + 1 - first;
  std::vector<Real> buffer(static_cast<std::size_t>(4 * p.size + count), Real{0});
  Real* query = buffer.data();
  Real* key = query + p.size;
  Real* value = key + p.size;
  Real* out = value + p.size;
  Real* weights = out + p.size;
  head.load_query(token, query);
  for (std::int64_t i = 0; i < count; ++i) {
    if (i < p.sinks) {
      head.load_sink(i, key, value);
    } else {
      head.load_key(first + i - p.sinks, key);
    }
    weights[i] = dot(query, key, p.size);
  }
  const Real largest = *std::max_element(weights, weights + count);
  Real sum{0};
  for (std::int64_t i = 0; i < count; ++i) {
    weights[i] = std::exp(weights[i] - largest);
    sum += weights[i];
    if (i < p.sinks) {
      head.load_sink(i, key, value);
    } else {
      head.load_value(first + i - p.sinks, value);
    }
    add_scaled_row(value, weights[i], p.size, out);
  }
  scale_row(out, Real{1} / sum, p.size, out);
  store_row(out, p.size, p.o.at(head.offset(token)), p.o.dtype);
  const Real log_sum = largest + std::log(sum);
  store_row(&log_sum, 1, p.log_sum.at(head.log_sum_offset(token)), p.log_sum.dtype);
}

template <class Real>
void attention_forward(const AttentionParams& p, const Executor& executor) {
  const RotaryTable<Real> table(p.position, p.batch, p.tokens, p.size, p.rope_base, executor);
  const auto heads = p.batch * p.heads;
  if (p.tokens <= kFewTokens) {
    executor.run(heads * p.tokens, [&](std::int64_t task) {
      const auto row = task / p.tokens;
      attend_token<Real>({p, table, row / p.heads, row % p.heads}, task % p.tokens);
    });
    return;
  }
  const auto segments = (p.tokens + kSegment - 1) / kSegment;
  executor.run(heads * segments, [&](std::int64_t task) {
    const auto row = task / segments;
    const auto begin = task % segments * kSegment;
    const AttentionHead<Real> head{p, table, row / p.heads, row % p.heads};
    attend_segment(head, begin, std::min(p.tokens, begin + kSegment));
  });
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
