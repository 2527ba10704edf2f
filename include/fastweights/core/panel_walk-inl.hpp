// What every chunkwise rule shares: the tokens of a head pass by, chunk after chunk, while a few
// columns of its state (a panel) stay in the nearest cache. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_PANEL_WALK_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_PANEL_WALK_INL_HPP_
#undef FASTWEIGHTS_CORE_PANEL_WALK_INL_HPP_
#else
#define FASTWEIGHTS_CORE_PANEL_WALK_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/executor.hpp"
#include "fastweights/core/matrix-inl.hpp"
#include "fastweights/core/rows-inl.hpp"
#include "fastweights/core/rule.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// Tokens of one chunk. Small: every token in a chunk costs a column of triangular work, and eight
/// are enough to read the state once for many multiplications (docs/delta_rule.md).
inline constexpr int kChunk = 8;

/// Tokens that are packed at a time, so that the packed form of a long sequence stays in cache.
inline constexpr std::int64_t kBlock = 64;
inline constexpr std::int64_t kChunksPerBlock = kBlock / kChunk;

/// Numbers between two packed rows. Odd in cache lines, so that the rows of a chunk spread over the
/// sets of the nearest cache, and known when compiling, so that one address serves all rows.
template <class Real>
inline constexpr std::int64_t kRowStride =
    kMaxHeadSize + static_cast<std::int64_t>(AlignedBuffer<Real>::kAlignment / sizeof(Real));

/// One value head of one sequence, walked from its first token to its last.
struct Head {
  Sequence sequence;
  std::int64_t key_head = 0;
  std::int64_t value_head = 0;
};

template <class Real>
Head head_of(const RuleParams<Real>& params, std::int64_t n, std::int64_t value_head) {
  return {params.sequence(n), value_head / params.value_heads_per_key_head(), value_head};
}

// ---- rows of a call ----------------------------------------------------------------------------

template <class Real>
void load_padded_row(const ConstView& view, std::int64_t batch, std::int64_t token,
                     std::int64_t head, std::int64_t size, std::int64_t stride, Real* out) {
  load_row<Real>(view.at(batch, token, head), view.dtype, size, out);
  std::fill(out + size, out + stride, Real{0});
}

/// The decay factor exp(g) of a token, 1 without a gate. Decays over several tokens are products of
/// these: a gate of −∞ is an exact zero, and no difference of large sums is ever formed.
template <class Real>
Real decay_of(const RuleParams<Real>& params, const Head& head, std::int64_t token) {
  if (!params.g) return Real{1};
  const auto* g = params.g.at(head.sequence.batch, token, head.value_head);
  return std::exp(load_scalar<Real>(g, params.g.dtype));
}

/// Loads a key or query row, normalised and scaled as the call asks.
template <class Real>
void load_feature_row(const RuleParams<Real>& params, const ConstView& view, Real scale,
                      const Head& head, std::int64_t token, std::int64_t stride, Real* out) {
  const std::int64_t size = params.shape.K;
  const void* row = view.at(head.sequence.batch, token, head.key_head);
  const Real* source = out;
  if (view.dtype == dtype_of<Real>()) {
    source = static_cast<const Real*>(row);
  } else {
    load_row(row, view.dtype, size, out);
  }
  if (params.use_qk_l2norm) scale *= inverse_norm(source, size);
  scale_row(source, scale, size, out);
  std::fill(out + size, out + stride, Real{0});
}

template <class Real>
Real load_gate(const ConstView& view, const Head& head, std::int64_t token) {
  return load_scalar<Real>(view.at(head.sequence.batch, token, head.value_head), view.dtype);
}

/// A gate of the block's tokens, `missing` past `count`.
template <class Real>
void load_gates(const ConstView& view, const Head& head, std::int64_t begin, std::int64_t count,
                Real missing, Real (&out)[kBlock]) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto* gate =
        view.at(head.sequence.batch, head.sequence.begin + begin + i, head.value_head);
    out[i] = load_scalar<Real>(gate, view.dtype);
  }
  std::fill(out + count, out + kBlock, missing);
}

/// The log-decays of the block's tokens, 0 past `count`.
template <class Real>
void load_log_decays(const RuleParams<Real>& params, const Head& head, std::int64_t begin,
                     std::int64_t count, Real (&out)[kBlock]) {
  if (params.g) {
    load_gates(params.g, head, begin, count, Real{0}, out);
  } else {
    std::fill(out, out + kBlock, Real{0});
  }
}

// ---- decays that wait --------------------------------------------------------------------------

/// Range of a decay that may wait: within it a scaled state loses no range worth speaking of.
inline constexpr double kLeastPending = 0.5;
inline constexpr double kMostPending = 2.0;

/// The decay of a state that is not applied yet: the state is `scale()` times the one stored.
///
/// A factor near 1 that multiplied the state in every chunk would round it every time, and with a
/// constant gate in the same direction: the state would drift (docs/numerics.md). So decays gather
/// here, in fp64, until they are worth a multiplication, and meanwhile scale what is read from the
/// state and, inversely, what is written to it.
class PendingDecay {
 public:
  double scale() const { return scale_; }

  /// Adds a chunk's decay. Returns the factor by which the chunk multiplies the stored state: 1 as
  /// long as the decay can wait and `settle` does not ask for all of it.
  double take(double decay, bool settle) {
    scale_ *= decay;
    if (!settle && scale_ >= kLeastPending && scale_ <= kMostPending) return 1;
    return std::exchange(scale_, 1.0);
  }

 private:
  double scale_ = 1;
};

// ---- rows to come ------------------------------------------------------------------------------

/// Asks for the rows of the tokens that come next while the present ones are worked on: rows of one
/// head lie far apart, and no hardware guesses them. `tick` is called often and evenly, since only
/// a dozen lines can be under way at once.
template <class Real>
class RowPrefetch {
 public:
  /// Aims at tokens [begin, begin + count) of a head, to be asked for in `ticks` ticks.
  void aim(const RuleParams<Real>& params, const Head& head, std::int64_t begin, std::int64_t count,
           std::int64_t ticks) {
    streams_ = 0;
    const std::int64_t keys = params.shape.K;
    std::int64_t lines = 0;
    const auto add = [&](const auto& view, std::int64_t h, std::int64_t size) {
      if (!view || count == 0) return;
      const auto bytes = static_cast<std::int64_t>(size_of(view.dtype));
      const void* first = view.at(head.sequence.batch, head.sequence.begin + begin, h);
      stream_[streams_++] = {static_cast<const std::byte*>(first), view.time_stride * bytes,
                             size * bytes};
      lines += (size * bytes + kLine - 1) / kLine;
    };
    for (const ConstView* view : {&params.q, &params.k, &params.a, &params.b, &params.p}) {
      add(*view, head.key_head, keys);
    }
    add(params.v, head.value_head, params.shape.V);
    if (params.channel_gate) add(params.g, head.value_head, keys);
    add(params.o, head.value_head, params.shape.V);
    rows_ = streams_ * count;
    row_ = 0;
    credit_ = 0;
    rate_ = static_cast<std::int32_t>(std::min<std::int64_t>(kOne, kOne * lines * count / ticks));
    line_ = end_ = nullptr;
  }

  HWY_INLINE void tick() {
    credit_ += rate_;
    if (credit_ < kOne) return;
    credit_ -= kOne;
    if (line_ >= end_ && !next_row()) return;
    __builtin_prefetch(line_, 0, 2);
    line_ += kLine;
  }

 private:
  static constexpr std::int64_t kLine = 64;
  static constexpr std::int32_t kOne = 1 << 16;

  struct Stream {
    const std::byte* first;
    std::int64_t stride;
    std::int64_t bytes;
  };

  HWY_NOINLINE bool next_row() {
    if (row_ >= rows_) {
      rate_ = 0;
      return false;
    }
    const Stream& stream = stream_[row_ % streams_];
    line_ = stream.first + row_ / streams_ * stream.stride;
    end_ = line_ + stream.bytes;
    ++row_;
    return true;
  }

  Stream stream_[8];
  std::int64_t streams_ = 0;
  std::int64_t rows_ = 0;
  std::int64_t row_ = 0;
  const std::byte* line_ = nullptr;
  const std::byte* end_ = nullptr;
  std::int32_t credit_ = 0;
  std::int32_t rate_ = 0;
};

// ---- the state
// -----------------------------------------------------------------------------------

/// reads[i] ← Sᵀ x_i for packed rows x_i, a chunk's or fewer. Row r of the panel begins at
/// `state + r · state_stride`. Ticks once for every two rows.
template <std::size_t kRows, class Real>
HWY_INLINE void read_state(const Real* HWY_RESTRICT state, std::int64_t state_stride,
                           const Real* HWY_RESTRICT rows, std::int64_t keys,
                           RowPrefetch<Real>& prefetch,
                           Vector<Real> (&reads)[kRows][kPanelVectors]) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  constexpr int kCount = static_cast<int>(kRows);
  Vector<Real> sum[kCount][kPanelVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) sum[i][j] = hn::Zero(d);
  }
  const auto add_row = [&](std::int64_t r) HWY_ATTR {
    Vector<Real> row[kPanelVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) row[j] = hn::LoadU(d, state + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const auto x = hn::Set(d, rows[i * kRowStride<Real> + r]);
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) sum[i][j] = hn::MulAdd(x, row[j], sum[i][j]);
    }
    state += state_stride;
  };
  std::int64_t r = 0;
  for (; r + 2 <= keys; r += 2) {
    add_row(r);
    add_row(r + 1);
    prefetch.tick();
  }
  if (r < keys) add_row(r);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) reads[i][j] = sum[i][j];
  }
}

/// S ← D S + Σ_i k_i w_iᵀ over packed rows k_i, a chunk's or fewer; `decay(r, row)` is row r of
/// D S.
template <std::size_t kRows, class Real, class Decay>
HWY_INLINE void write_state(Real* HWY_RESTRICT state, std::int64_t state_stride,
                            const Real* HWY_RESTRICT rows, std::int64_t keys, const Decay& decay,
                            const Vector<Real> (&writes)[kRows][kPanelVectors]) {
  const Tag<Real> d;
  constexpr std::int64_t kLanes = kPanel<Real> / kPanelVectors;
  constexpr int kCount = static_cast<int>(kRows);
  Vector<Real> w[kCount][kPanelVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) w[i][j] = writes[i][j];
  }
  for (std::int64_t r = 0; r < keys; ++r, state += state_stride) {
    Vector<Real> row[kPanelVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      row[j] = decay(r, hn::LoadU(d, state + j * kLanes));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const auto x = hn::Set(d, rows[i * kRowStride<Real> + r]);
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) row[j] = hn::MulAdd(x, w[i][j], row[j]);
    }
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) hn::StoreU(row[j], d, state + j * kLanes);
  }
}

/// Copies columns of a [K, V] state into panels, or zeros where there is none.
template <class Real>
void load_state(const Real* state, const Shape& shape, std::int64_t first_panel,
                std::int64_t panels, Real* out) {
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t column = (first_panel + panel) * kPanel<Real>;
    const std::int64_t width = std::min(kPanel<Real>, shape.V - column);
    for (std::int64_t r = 0; r < shape.K; ++r, out += kPanel<Real>) {
      std::fill(out, out + kPanel<Real>, Real{0});
      if (state != nullptr) std::copy_n(state + r * shape.V + column, width, out);
    }
  }
}

template <class Real>
void store_state(const Real* panels_of_state, const Shape& shape, std::int64_t first_panel,
                 std::int64_t panels, Real* out) {
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t column = (first_panel + panel) * kPanel<Real>;
    const std::int64_t width = std::min(kPanel<Real>, shape.V - column);
    for (std::int64_t r = 0; r < shape.K; ++r, panels_of_state += kPanel<Real>) {
      std::copy_n(panels_of_state, width, out + r * shape.V + column);
    }
  }
}

/// Copies one head's initial state to where it is worked on.
template <class Real>
Real* working_state(const Real* initial, Real* working, std::int64_t offset, const Shape& shape) {
  Real* state = working + offset;
  if (initial == nullptr) {
    std::fill_n(state, shape.K * shape.V, Real{0});
  } else if (initial != working) {
    std::copy_n(initial + offset, shape.K * shape.V, state);
  }
  return state;
}

/// One head's state as the recurrent form works on it: its place in `final`, or a copy of one in
/// bf16, which goes back rounded when the head is done.
template <class Real>
class WorkingState {
 public:
  WorkingState(const Real* initial, Real* final, std::uint16_t* narrow, std::int64_t offset,
               const Shape& shape)
      : narrow_(narrow != nullptr ? narrow + offset : nullptr),
        copy_(static_cast<std::size_t>(narrow != nullptr ? shape.K * shape.V : 0)) {
    if (narrow_ != nullptr) {
      load_row(narrow_, DType::kBFloat16, shape.K * shape.V, copy_.data());
      state_ = copy_.data();
    } else {
      state_ = working_state(initial, final, offset, shape);
    }
  }
  WorkingState(const WorkingState&) = delete;
  WorkingState& operator=(const WorkingState&) = delete;
  ~WorkingState() {
    if (narrow_ == nullptr) return;
    store_row(copy_.data(), static_cast<std::int64_t>(copy_.size()), narrow_, DType::kBFloat16);
  }

  Real* data() const { return state_; }

 private:
  std::uint16_t* narrow_;
  AlignedBuffer<Real> copy_;
  Real* state_;
};

// ---- products of a chunk's rows
// ------------------------------------------------------------------

/// sums[i] ← the dot product of `row` with row i of `others`, for kCount rows `kRowStride` apart.
template <int kCount, class Real>
HWY_INLINE void add_dots(const Real* HWY_RESTRICT row, const Real* HWY_RESTRICT others,
                         std::int64_t size, Vector<Real>* HWY_RESTRICT sums) {
  if constexpr (kCount > 0) {
    const Tag<Real> d;
    constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
    Vector<Real> sum[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sum[i] = hn::Zero(d);
    for (std::int64_t c = 0; c < size; c += kLanes) {  // rows are padded with zeros
      const auto x = hn::Load(d, row + c);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        sum[i] = hn::MulAdd(x, hn::Load(d, others + i * kRowStride<Real> + c), sum[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sums[i] = sum[i];
  }
}

// ---- walking
// -------------------------------------------------------------------------------------

/// Bytes of states that one task works on at a time: they stay in the second cache while the heads
/// of a block of tokens, which lie side by side in memory, take turns.
inline constexpr std::int64_t kGroupBytes = std::int64_t{512} << 10;

/// Some value heads of one sequence, and some of their panels: what one task walks.
struct HeadGroup {
  std::int64_t n = 0;
  std::int64_t first_head = 0;
  std::int64_t heads = 0;
  std::int64_t first_panel = 0;
  std::int64_t panels = 0;
};

/// Cuts a call into groups of heads and, where heads are too few for the executor's threads, into
/// panels of columns. Heads and columns never meet, so the cut changes no bit.
template <class Real, class Body>
void for_each_head_group(const Packing& call, const Executor& executor, const Body& body) {
  const std::int64_t heads = call.shape.HV;
  const std::int64_t all = call.sequences() * heads;
  if (all == 0) return;
  const std::int64_t panels = round_up(call.shape.V, kPanel<Real>) / kPanel<Real>;
  const bool enough = all >= executor.threads && all % executor.threads == 0;
  const std::int64_t wanted = (2 * executor.threads + all - 1) / all;
  const std::int64_t parts = enough ? 1 : std::clamp<std::int64_t>(wanted, 1, panels);
  const std::int64_t panels_per_part = (panels + parts - 1) / parts;

  const std::int64_t state_bytes =
      call.shape.K * panels_per_part * kPanel<Real> * static_cast<std::int64_t>(sizeof(Real));
  const std::int64_t share = std::max<std::int64_t>(all * parts / executor.threads, 1);
  std::int64_t group =
      std::clamp<std::int64_t>(kGroupBytes / state_bytes, 1, std::min(share, heads));
  while (heads % group != 0) --group;  // equal groups
  const std::int64_t groups = heads / group;
  executor.run(call.sequences() * groups * parts, [&](std::int64_t task) {
    const std::int64_t first_panel = task % parts * panels_per_part;
    const std::int64_t count = std::min(panels_per_part, panels - first_panel);
    const std::int64_t index = task / parts;
    if (count <= 0) return;
    body(HeadGroup{index / groups, index % groups * group, group, first_panel, count});
  });
}

/// Values and outputs of up to `kBlock` tokens of one head: the call's own rows where the kernels
/// can work on them, else copies.
template <class Real>
class TokenBlock {
 public:
  explicit TokenBlock(const Shape& shape)
      : columns_(shape.V),
        stride_(round_up(shape.V, kPanel<Real>)),
        value_copies_(static_cast<std::size_t>(kBlock * stride_)),
        output_copies_(static_cast<std::size_t>(kBlock * stride_)) {}

  void load(const RuleParams<Real>& params, const Head& head, std::int64_t begin,
            std::int64_t count) {
    const std::int64_t first = head.sequence.begin + begin;
    const auto batch = head.sequence.batch;
    const bool whole = columns_ == stride_ && count % kChunk == 0;
    if (whole && params.v.dtype == dtype_of<Real>()) {
      values = static_cast<const Real*>(params.v.at(batch, first, head.value_head));
      value_stride = params.v.time_stride;
    } else {
      for (std::int64_t i = 0; i < count; ++i) {
        load_padded_row(params.v, batch, first + i, head.value_head, columns_, stride_,
                        value_copies_.data() + i * stride_);
      }
      const std::int64_t end = round_up(count, kChunk);
      std::fill(value_copies_.data() + count * stride_, value_copies_.data() + end * stride_,
                Real{0});
      values = value_copies_.data();
      value_stride = stride_;
    }
    direct_ = whole && params.o && params.o.dtype == dtype_of<Real>();
    outputs = direct_ ? static_cast<Real*>(params.o.at(batch, first, head.value_head))
                      : output_copies_.data();
    output_stride = direct_ ? params.o.time_stride : stride_;
  }

  /// Writes columns [first, first + columns) of the outputs where they are copies.
  void store(const RuleParams<Real>& params, const Head& head, std::int64_t begin,
             std::int64_t count, std::int64_t first, std::int64_t columns) const {
    if (direct_ || !params.o) return;
    const std::int64_t offset = first * static_cast<std::int64_t>(size_of(params.o.dtype));
    for (std::int64_t i = 0; i < count; ++i) {
      void* row =
          params.o.at(head.sequence.batch, head.sequence.begin + begin + i, head.value_head);
      store_row(output_copies_.data() + i * stride_ + first, columns,
                static_cast<std::byte*>(row) + offset, params.o.dtype);
    }
  }

  const Real* values = nullptr;
  std::int64_t value_stride = 0;
  Real* outputs = nullptr;
  std::int64_t output_stride = 0;

 private:
  std::int64_t columns_;
  std::int64_t stride_;
  AlignedBuffer<Real> value_copies_;   // [kBlock, stride]
  AlignedBuffer<Real> output_copies_;  // [kBlock, stride]
  bool direct_ = false;
};

/// One chunk's place on one panel: rows of values and outputs of its tokens, at the panel's first
/// column.
template <class Real>
struct ChunkRows {
  const Real* values;
  std::int64_t value_stride;
  Real* outputs;
  std::int64_t output_stride;
};

/// Walks a group of heads over its sequence. A `Form` says what a rule does with packed tokens:
///   Block<Real>           what it packs of up to kBlock tokens; made from a Shape
///   Pending<Real>         a head's decays that wait; made from a Shape
///   kStates               how many matrices it carries, 1 or 2
///   pack(params, head, begin, count, settle, pending, block)   with `settle`, nothing waits after
///                         the block
///   kReads                how often `step` reads a state
///   step(block, chunk, shape, rows, prefetch, state, second)  one chunk on one panel
template <class Form, class Real>
void walk_heads(const RuleParams<Real>& params, const HeadGroup& group) {
  const Shape& shape = params.shape;
  const std::int64_t first_column = group.first_panel * kPanel<Real>;
  const std::int64_t columns = std::min(group.panels * kPanel<Real>, shape.V - first_column);
  const std::int64_t panel_size = shape.K * kPanel<Real>;
  const std::int64_t state_size = group.panels * panel_size;
  const auto size = static_cast<std::size_t>(group.heads * state_size);
  AlignedBuffer<Real> states(size);
  AlignedBuffer<Real> seconds(Form::kStates > 1 ? size : 0);
  const auto each_state = [&](std::int64_t i, const auto& move) {
    const std::int64_t offset = params.state_offset(group.n, group.first_head + i);
    move(offset, params.initial_state, params.final_state, states.data() + i * state_size);
    if constexpr (Form::kStates > 1) {
      move(offset, params.initial_momentum, params.final_momentum, seconds.data() + i * state_size);
    }
  };
  for (std::int64_t i = 0; i < group.heads; ++i) {
    each_state(i, [&](std::int64_t offset, const Real* from, const Real*, Real* state) {
      load_state(from ? from + offset : nullptr, shape, group.first_panel, group.panels, state);
    });
  }
  typename Form::template Block<Real> block(shape);
  using Pending = typename Form::template Pending<Real>;
  std::vector<Pending> pending;
  for (std::int64_t i = 0; i < group.heads; ++i) pending.push_back(Pending(shape));
  TokenBlock<Real> rows(shape);
  RowPrefetch<Real> prefetch;
  const std::int64_t length = params.sequence(group.n).length;
  for (std::int64_t begin = 0; begin < length; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, length - begin);
    const std::int64_t chunks = (count + kChunk - 1) / kChunk;
    for (std::int64_t i = 0; i < group.heads; ++i) {
      const Head head = head_of(params, group.n, group.first_head + i);
      Form::pack(params, head, begin, count, begin + count == length,
                 pending[static_cast<std::size_t>(i)], block);
      rows.load(params, head, begin, count);
      const bool last = i + 1 == group.heads;
      const std::int64_t next = last ? begin + kBlock : begin;
      prefetch.aim(params, head_of(params, group.n, group.first_head + (last ? 0 : i + 1)), next,
                   std::clamp<std::int64_t>(length - next, 0, kBlock),
                   group.panels * chunks * Form::kReads * std::max<std::int64_t>(shape.K / 2, 1));
      for (std::int64_t panel = 0; panel < group.panels; ++panel) {
        const std::int64_t column = first_column + panel * kPanel<Real>;
        const std::int64_t at = i * state_size + panel * panel_size;
        Real* second = Form::kStates > 1 ? seconds.data() + at : nullptr;
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
          const std::int64_t token = chunk * kChunk;
          Form::step(block, chunk, shape,
                     ChunkRows<Real>{
                         rows.values + token * rows.value_stride + column, rows.value_stride,
                         rows.outputs + token * rows.output_stride + column, rows.output_stride},
                     prefetch, states.data() + at, second);
        }
      }
      rows.store(params, head, begin, count, first_column, columns);
    }
  }
  for (std::int64_t i = 0; i < group.heads; ++i) {
    each_state(i, [&](std::int64_t offset, const Real*, Real* to, const Real* state) {
      if (to != nullptr) store_state(state, shape, group.first_panel, group.panels, to + offset);
    });
  }
}

/// The chunkwise form of a rule over all heads.
template <class Form, class Real>
void forward_chunkwise(const RuleParams<Real>& params, const Executor& executor) {
  for_each_head_group<Real>(params, executor,
                            [&](const HeadGroup& group) { walk_heads<Form>(params, group); });
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
