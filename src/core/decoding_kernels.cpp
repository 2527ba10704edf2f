// Tokens of some sessions through a language model. Every loop over a team's threads is
// cut the same way for any number of them, and every product of a row is summed in the same order
// whatever rows and sessions share its tile: the bits of a session depend neither on threads nor on
// company. So what a compiler may contract or not is in one place for all of them, or is spelt out.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "decoding_kernels.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <span>
#include <vector>

#include "activation-inl.hpp"
#include "fastweights/core/decoding.hpp"
#include "fastweights/core/recurrent-inl.hpp"
#include "fastweights/core/softmax_delta_rule-inl.hpp"
#include "fastweights/core/team.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {
namespace {

using cpu::DecodingAttention;
using cpu::DecodingHeadState;
using cpu::DecodingLayer;
using cpu::DecodingMemory;
using cpu::DecodingModel;
using cpu::DecodingSizes;
using cpu::DecodingState;
using cpu::DecodingToken;
using cpu::Weights;

using Float = hn::ScalableTag<float>;

// ---- elements of the model's type

inline std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(Float())); }

HWY_INLINE hn::Vec<Float> load(const float* from) { return hn::LoadU(Float(), from); }
HWY_INLINE hn::Vec<Float> load(const hwy::bfloat16_t* from) {
  const hn::Rebind<hwy::bfloat16_t, Float> half;
  return hn::PromoteTo(Float(), hn::LoadU(half, from));
}

inline float to_float(float value) { return value; }
inline float to_float(hwy::bfloat16_t value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(std::bit_cast<std::uint16_t>(value))
                              << 16);
}
inline void store(float value, float* to) { *to = value; }
inline void store(float value, hwy::bfloat16_t* to) {
  *to = std::bit_cast<hwy::bfloat16_t>(narrow_to_bfloat16(value));
}

// ---- products

/// Bytes of weights that one task streams: enough to outweigh the taking of a task.
constexpr std::int64_t kTaskBytes = 32768;
/// Rows of a matrix that are read at a time.
constexpr int kRows = 4;
/// Tokens whose vectors stay in the nearest cache while a task's weights pass.
constexpr std::int64_t kBlock = 16;

/// Rows in a tile of so many tokens: their sums fill half of the registers.
constexpr int rows_in_tile(int tokens) {
  return std::min(kRows, std::max(1, kRegisters / 4 / tokens));
}

/// A row of each of several tokens, `stride` apart.
struct Vectors {
  float* data;
  std::int64_t stride;

  Vectors from(std::int64_t token, std::int64_t element = 0) const {
    return {data + token * stride + element, stride};
  }
};

/// out[token][row] ← row · x[token], for rows of `columns` elements, `row_stride` apart. What
/// comes `kRows` rows later is asked for where the product waits for memory.
template <int kCount, int kTokens, class T>
HWY_INLINE void multiply_tile(const T* HWY_RESTRICT rows, std::int64_t row_stride,
                              std::int64_t columns, Vectors x, Vectors out) {
  const Float d;
  const hn::CappedTag<float, 1> one;
  constexpr int kSums = (kCount * kTokens + 3) / 4 * 4;
  const auto step = lanes();
  hn::Vec<Float> even[kSums], odd[kCount * kTokens];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) even[i] = hn::Zero(d);
#pragma GCC unroll 16
  for (int i = 0; i < kCount * kTokens; ++i) odd[i] = hn::Zero(d);
  const auto add = [&](std::int64_t c, hn::Vec<Float>* sums) HWY_ATTR {
    hn::Vec<Float> weights[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const T* at = rows + i * row_stride + c;
      if constexpr (kTokens == 1) hwy::Prefetch(at + kRows * row_stride);
      weights[i] = load(at);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      const auto vector = hn::LoadU(d, x.data + j * x.stride + c);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        sums[j * kCount + i] = hn::MulAdd(weights[i], vector, sums[j * kCount + i]);
      }
    }
  };
  std::int64_t c = 0;
  for (; c + 2 * step <= columns; c += 2 * step) {
    add(c, even);
    add(c + step, odd);
  }
  for (; c + step <= columns; c += step) add(c, even);
#pragma GCC unroll 16
  for (int i = 0; i < kCount * kTokens; ++i) even[i] = hn::Add(even[i], odd[i]);
  alignas(64) float sums[kSums];
  sum_each(d, even, kSums, sums);
  for (int j = 0; j < kTokens; ++j) {
    for (int i = 0; i < kCount; ++i) {
      auto sum = hn::Set(one, sums[j * kCount + i]);
      for (auto rest = c; rest < columns; ++rest) {
        sum = hn::MulAdd(hn::Set(one, to_float(rows[i * row_stride + rest])),
                         hn::Set(one, x.data[j * x.stride + rest]), sum);
      }
      out.data[j * out.stride + i] = hn::GetLane(sum);
    }
  }
}

/// The same for `count` rows and kTokens tokens.
template <int kTokens, class T>
HWY_INLINE void multiply_for(const T* rows, std::int64_t row_stride, std::int64_t columns,
                             std::int64_t count, Vectors x, Vectors out) {
  constexpr int kCount = rows_in_tile(kTokens);
  std::int64_t i = 0;
  for (; i + kCount <= count; i += kCount) {
    multiply_tile<kCount, kTokens>(rows + i * row_stride, row_stride, columns, x, out.from(0, i));
  }
  for (; i < count; ++i) {
    multiply_tile<1, kTokens>(rows + i * row_stride, row_stride, columns, x, out.from(0, i));
  }
}

/// out[token][i] ← row i · x[token], for `count` rows and any number of tokens.
template <class T>
HWY_NOINLINE void multiply_vectors(const T* rows, std::int64_t row_stride, std::int64_t columns,
                                   std::int64_t count, std::int64_t tokens, Vectors x,
                                   Vectors out) {
  std::int64_t j = 0;
  for (; j + 4 <= tokens; j += 4) {
    multiply_for<4>(rows, row_stride, columns, count, x.from(j), out.from(j));
  }
  for (; j + 2 <= tokens; j += 2) {
    multiply_for<2>(rows, row_stride, columns, count, x.from(j), out.from(j));
  }
  if (j < tokens) multiply_for<1>(rows, row_stride, columns, count, x.from(j), out.from(j));
}

/// The same with rows [first, first + count) of the matrix.
template <class T>
void multiply_rows(const Weights& matrix, std::int64_t first, std::int64_t count,
                   std::int64_t tokens, Vectors x, Vectors out) {
  const T* rows = static_cast<const T*>(matrix.data) + first * matrix.columns;
  multiply_vectors(rows, matrix.columns, matrix.columns, count, tokens, x, out);
}

/// Rows of one task.
template <class T>
std::int64_t rows_of_task(std::int64_t columns) {
  const auto bytes = columns * static_cast<std::int64_t>(sizeof(T));
  return std::max<std::int64_t>(kRows, kTaskBytes / bytes / kRows * kRows);
}

/// A range of rows of one of several matrices that are multiplied in one loop.
struct Rows {
  std::int64_t matrix;
  std::int64_t first;
  std::int64_t count;
};

/// Which rows task `task` has where matrices of so many `rows` are cut into tasks of `each`.
inline Rows rows_at(const std::int64_t* rows, std::int64_t each, std::int64_t task) {
  std::int64_t matrix = 0;
  while (task >= divide_up(rows[matrix], each)) task -= divide_up(rows[matrix++], each);
  const auto first = task * each;
  return {matrix, first, std::min(each, rows[matrix] - first)};
}

// ---- scratch memory

/// Rows of scratch memory of one token.
struct Scratch {
  float* x = nullptr;         // the residual stream
  float* normed = nullptr;    // a norm of it
  float* query = nullptr;     // of attention
  float* key = nullptr;       //
  float* value = nullptr;     //
  float* attended = nullptr;  // what the heads of attention return
  float* angles = nullptr;    // cosines, then sines, of the token's position
  float* features = nullptr;  // q, k, v of the memory, convolved
  float* beta = nullptr;
  float* decay = nullptr;
  float* gate = nullptr;
  float* recalled = nullptr;  // what the heads of the memory return
  float* hidden = nullptr;
  float* scores = nullptr;      // [heads, scores_stride]
  float* head_key = nullptr;    // the hidden state that predicted the token, times its strength
  float* head_error = nullptr;  // how wrong its prediction was
};

/// Where the rows of a token lie, each a multiple of 16 elements.
class ScratchLayout {
 public:
  explicit ScratchLayout(const DecodingModel& model) {
    const auto& s = model.sizes;
    place(&Scratch::x, s.width);
    place(&Scratch::normed, s.width);
    place(&Scratch::query, s.width);
    place(&Scratch::key, s.width);
    place(&Scratch::value, s.width);
    place(&Scratch::attended, s.width);
    place(&Scratch::angles, s.width);
    place(&Scratch::features, 2 * s.keys() + s.values());
    place(&Scratch::beta, s.memory_value_heads);
    place(&Scratch::decay, s.memory_value_heads);
    place(&Scratch::gate, s.values());
    place(&Scratch::recalled, s.values());
    place(&Scratch::hidden, s.feed_forward_width);
    scores_stride_ = padded(s.attention_sinks + s.attention_window);
    place(&Scratch::scores, scores_stride_ * s.attention_heads);
    if (!model.fast_head) return;
    place(&Scratch::head_key, s.width);
    place(&Scratch::head_error, model.output.rows);
  }

  /// Elements of a token.
  std::int64_t size() const { return size_; }
  std::int64_t scores_stride() const { return scores_stride_; }

  /// The rows of each token, one behind the other.
  std::vector<Scratch> rows(std::size_t tokens, float* memory) const {
    std::vector<Scratch> all(tokens);
    for (Scratch& each : all) {
      for (const auto& [member, offset] : places_) each.*member = memory + offset;
      memory += size_;
    }
    return all;
  }

 private:
  struct Place {
    float* Scratch::* member;
    std::int64_t offset;
  };

  static std::int64_t padded(std::int64_t size) { return (size + 31) / 16 * 16; }

  void place(float* Scratch::* member, std::int64_t size) {
    places_.push_back({member, size_});
    size_ += padded(size);
  }

  std::vector<Place> places_;
  std::int64_t size_ = 0;
  std::int64_t scores_stride_ = 0;
};

/// What a trace keeps of a token in one layer.
struct LayerTrace {
  float* inputs = nullptr;    // of the convolution [2·H·K + HV·V]
  float* features = nullptr;  // q, k, v of the memory, convolved
  float* beta = nullptr;      // [HV], as they are projected
  float* decay = nullptr;     // [HV]
  float* key = nullptr;       // of attention [width], rotated
  float* value = nullptr;     // [width]
};

/// And at the head, where the model has one.
struct HeadTrace {
  float* key = nullptr;     // of the write, times its strength [width]
  float* error = nullptr;   // [vocabulary]
  float* hidden = nullptr;  // what is to be written next [width]
  float* logits = nullptr;  // and its prediction [vocabulary]
};

/// Where the rows of a token's trace lie.
class TraceLayout {
 public:
  explicit TraceLayout(const DecodingModel& model) : model_(model) {
    const auto& s = model.sizes;
    channels_ = 2 * s.keys() + s.values();
    layer_ = 2 * channels_ + 2 * s.memory_value_heads + 2 * s.width;
    layers_ = layer_ * static_cast<std::int64_t>(model.layers.size());
  }

  std::int64_t size() const {
    return layers_ + (model_.fast_head ? 2 * (model_.sizes.width + model_.output.rows) : 0);
  }

  LayerTrace layer(float* trace, std::size_t number) const {
    if (trace == nullptr) return {};
    const auto& s = model_.sizes;
    LayerTrace rows;
    rows.inputs = trace + layer_ * static_cast<std::int64_t>(number);
    rows.features = rows.inputs + channels_;
    rows.beta = rows.features + channels_;
    rows.decay = rows.beta + s.memory_value_heads;
    rows.key = rows.decay + s.memory_value_heads;
    rows.value = rows.key + s.width;
    return rows;
  }

  HeadTrace head(float* trace) const {
    if (trace == nullptr || !model_.fast_head) return {};
    const auto width = model_.sizes.width;
    const auto vocabulary = model_.output.rows;
    HeadTrace rows;
    rows.key = trace + layers_;
    rows.error = rows.key + width;
    rows.hidden = rows.error + vocabulary;
    rows.logits = rows.hidden + width;
    return rows;
  }

 private:
  const DecodingModel& model_;
  std::int64_t channels_ = 0;
  std::int64_t layer_ = 0;
  std::int64_t layers_ = 0;
};

// ---- between the products

void norm(const float* x, const float* weight, std::int64_t size, double epsilon, float* out) {
  const float mean = dot(x, x, size) / static_cast<float>(size);
  const float scale = 1.0f / std::sqrt(mean + static_cast<float>(epsilon));
  for (std::int64_t i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

/// out ← x · sigmoid(x) ⊙ factor, where `factor` may be null.
void silu(const float* x, const float* factor, std::int64_t size, float* out) {
  const auto run = [&](auto d, std::int64_t i) {
    const auto z = hn::LoadU(d, x + i);
    auto y = hn::Mul(z, sigmoid(d, z));
    if (factor != nullptr) y = hn::Mul(y, hn::LoadU(d, factor + i));
    hn::StoreU(y, d, out + i);
  };
  std::int64_t i = 0;
  for (; i + lanes() <= size; i += lanes()) run(Float(), i);
  for (; i < size; ++i) run(hn::CappedTag<float, 1>(), i);
}

// ---- writes

/// One token's write into one head of a memory, `key` of unit length.
struct MemoryWrite {
  float decay;
  float beta;
};

float decay_of_head(const DecodingMemory& m, float projected, float strength, std::int64_t head) {
  if (m.decay.data == nullptr || strength == 0.0f) return 1.0f;
  const float x = projected + m.dt_bias[head];
  const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
  return std::exp(-std::exp(m.a_log[head]) * softplus * std::min(strength, 1.0f));
}

MemoryWrite write_of_head(const DecodingModel& model, const DecodingMemory& m, float beta,
                          float decay, float strength, std::int64_t head) {
  const float trained =
      static_cast<float>(model.sizes.beta_max) / (1.0f + std::exp(-std::max(beta, -87.0f)));
  return {decay_of_head(m, decay, strength, head), std::min(trained * strength, 2.0f)};
}

float head_eta(const DecodingModel& model, float strength) {
  return std::min(static_cast<float>(model.head_eta) * strength, 2.0f);
}

/// The write of the memory at the head on its columns [begin, end); `key` is scaled by η.
void write_head(const DecodingModel& model, float* state, float strength, const float* key,
                const float* error, std::int64_t begin, std::int64_t end) {
  const auto width = model.sizes.width;
  const auto vocabulary = model.output.rows;
  const float eta = head_eta(model, strength);
  const auto shrink = static_cast<float>(
      std::expm1(model.head_decay * std::min(static_cast<double>(strength), 1.0)));
  if (eta == 0.0f && shrink == 0.0f) return;
  softmax_delta::multiply<float>({.rows = width,
                                  .inner = eta != 0.0f ? 1 : 0,
                                  .left = key,
                                  .left_row = 1,
                                  .left_inner = width,
                                  .right = error,
                                  .right_stride = vocabulary,
                                  .base = state,
                                  .base_stride = vocabulary,
                                  .shrink = shrink,
                                  .out = state,
                                  .out_stride = vocabulary},
                                 begin, end);
}

/// Some tokens that follow each other in one session.
struct Run {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

std::vector<Run> runs_of(std::span<const DecodingToken> tokens) {
  std::vector<Run> runs;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i == 0 || tokens[i].states != tokens[i - 1].states) {
      runs.push_back({static_cast<std::int64_t>(i), 0});
    }
    ++runs.back().count;
  }
  return runs;
}

/// Everything of a batch of tokens; `T` is the model's type.
template <class T>
class Decoder {
 public:
  Decoder(const DecodingModel& model, std::span<const DecodingToken> tokens, float* memory,
          Team& team)
      : model_(model),
        sizes_(model.sizes),
        tokens_(tokens),
        runs_(runs_of(tokens)),
        layout_(model),
        trace_(model),
        s_(layout_.rows(tokens.size(), memory)),
        team_(team) {}

  void run(float* logits) {
    for_each_token([&](std::int64_t i) { start(i); });
    for (std::size_t layer = 0; layer < model_.layers.size(); ++layer) run_layer(layer);
    norm_all(model_.norm);
    for_each_token([&](std::int64_t i) {
      if (token(i).hidden == nullptr) return;
      std::copy_n(scratch(i).normed, sizes_.width, token(i).hidden);
    });
    const auto vocabulary = model_.output.rows;
    const auto each = rows_of_task<T>(sizes_.width);
    team_.loop(divide_up(vocabulary, each), [&](std::int64_t task) {
      const auto first = task * each;
      const auto count = std::min(each, vocabulary - first);
      const Vectors out{logits, vocabulary};
      for_each_block([&](std::int64_t i, std::int64_t together) {
        multiply_rows<T>(model_.output, first, count, together, rows(&Scratch::normed, i),
                         out.from(i, first));
      });
    });
    if (model_.fast_head) correct(logits);
  }

 private:
  std::int64_t count() const { return static_cast<std::int64_t>(tokens_.size()); }
  const DecodingToken& token(std::int64_t i) const { return tokens_[static_cast<std::size_t>(i)]; }
  Scratch& scratch(std::int64_t i) { return s_[static_cast<std::size_t>(i)]; }
  const DecodingState& state(std::int64_t i, std::size_t layer) const {
    return token(i).states[layer];
  }

  /// A row of scratch memory of the tokens from `i` on, from its element `element` on.
  Vectors rows(float* Scratch::* member, std::int64_t i, std::int64_t element = 0) {
    return {scratch(i).*member + element, layout_.size()};
  }

  /// Runs `body(token)` for each; one is not worth a loop of the team.
  template <class Body>
  void for_each_token(const Body& body) {
    if (count() == 1) return body(0);
    team_.loop(count(), body);
  }

  /// Runs `body(first, count)` on blocks of tokens.
  template <class Body>
  void for_each_block(const Body& body) const {
    for (std::int64_t first = 0; first < count(); first += kBlock) {
      body(first, std::min(kBlock, count() - first));
    }
  }

  void norm_all(const float* weight) {
    for_each_token([&](std::int64_t i) {
      norm(scratch(i).x, weight, sizes_.width, sizes_.norm_epsilon, scratch(i).normed);
    });
  }

  /// The embedding of a token, and the angles of its position.
  void start(std::int64_t i) {
    const T* row = static_cast<const T*>(model_.embedding.data) + token(i).token * sizes_.width;
    float* x = scratch(i).x;
    for (std::int64_t c = 0; c < sizes_.width; ++c) x[c] = to_float(row[c]);
    fill_angles(token(i).position, scratch(i).angles);
  }

  // The angles of RotaryTable for a call of one token.
  void fill_angles(std::int64_t position, float* angles) const {
    if (sizes_.attention_heads == 0) return;
    const auto pairs = head_size() / 4;
    for (std::int64_t i = 0; i < pairs; ++i) {
      const double frequency =
          std::pow(sizes_.rope_base, -static_cast<double>(i) / static_cast<double>(pairs));
      const double angle = static_cast<double>(position) * frequency;
      angles[i] = static_cast<float>(std::cos(angle));
      angles[pairs + i] = static_cast<float>(std::sin(angle));
    }
  }

  std::int64_t head_size() const { return sizes_.width / sizes_.attention_heads; }

  /// Writes each token into the memory at the head, for the hidden state that predicted it, reads
  /// the memory for the new one and leaves that to be written next. Tokens of one session wait for
  /// each other.
  void correct(float* logits) {
    const auto vocabulary = model_.output.rows;
    const auto each = softmax_delta::kColumns;
    const auto tasks = divide_up(vocabulary, each);
    std::int64_t longest = 0;
    for (const Run& run : runs_) longest = std::max(longest, run.count);
    for (std::int64_t step = 0; step < longest; ++step) {
      std::vector<std::int64_t> now;
      for (const Run& run : runs_) {
        if (step < run.count) now.push_back(run.first + step);
      }
      const auto together = static_cast<std::int64_t>(now.size());
      const auto prepare = [&](std::int64_t i) { prepare_head(now[static_cast<std::size_t>(i)]); };
      if (together == 1) {
        prepare(0);
      } else {
        team_.loop(together, prepare);
      }
      team_.loop(together * tasks, [&](std::int64_t task) {
        const auto i = now[static_cast<std::size_t>(task / tasks)];
        const auto begin = task % tasks * each;
        correct_columns(i, begin, std::min(vocabulary, begin + each), logits + i * vocabulary);
      });
    }
  }

  /// What the head's products need: the key and the error of the write, and the key of the read.
  void prepare_head(std::int64_t token_index) {
    const auto width = sizes_.width;
    const auto vocabulary = model_.output.rows;
    const DecodingToken& read = token(token_index);
    const DecodingHeadState& head = read.head;
    Scratch& s = scratch(token_index);
    const float eta = head_eta(model_, read.strength);
    T* hidden = static_cast<T*>(head.hidden);
    for (std::int64_t i = 0; i < width; ++i) s.head_key[i] = to_float(hidden[i]);
    scale_row(s.head_key, eta * inverse_norm(s.head_key, width), width, s.head_key);
    if (eta != 0.0f) {
      softmax_delta::prediction_error(head.logits, read.token, vocabulary, s.head_error);
    }
    // As the modules have it: the hidden state in the model's type.
    for (std::int64_t i = 0; i < width; ++i) {
      store(s.normed[i], hidden + i);
      s.normed[i] = to_float(hidden[i]);
    }
    if (read.trace != nullptr) {
      const HeadTrace trace = trace_.head(read.trace);
      std::copy_n(s.head_key, width, trace.key);
      if (eta != 0.0f) std::copy_n(s.head_error, vocabulary, trace.error);
      std::copy_n(s.normed, width, trace.hidden);
    }
    scale_row(s.normed, inverse_norm(s.normed, width), width, s.normed);
  }

  /// The write and the read of the head on its columns [begin, end).
  void correct_columns(std::int64_t i, std::int64_t begin, std::int64_t end, float* logits) {
    const auto width = sizes_.width;
    const auto vocabulary = model_.output.rows;
    const DecodingHeadState& head = token(i).head;
    const Scratch& s = scratch(i);
    write_head(model_, head.state, token(i).strength, s.head_key, s.head_error, begin, end);
    softmax_delta::multiply<float>({.rows = 1,
                                    .inner = width,
                                    .left = s.normed,
                                    .left_row = width,
                                    .left_inner = 1,
                                    .right = head.state,
                                    .right_stride = vocabulary,
                                    .base = logits,
                                    .base_stride = vocabulary,
                                    .out = logits,
                                    .out_stride = vocabulary},
                                   begin, end);
    std::copy(logits + begin, logits + end, head.logits + begin);
    if (token(i).trace != nullptr) {
      std::copy(logits + begin, logits + end, trace_.head(token(i).trace).logits + begin);
    }
  }

  void run_layer(std::size_t number) {
    const DecodingLayer& layer = model_.layers[number];
    norm_all(layer.mixer_norm);
    project(layer, number);
    run_heads(layer, number);
    mix(layer);
    const bool last = number + 1 == model_.layers.size();
    if (last) hand_out_mixed();
    norm_all(layer.feed_forward_norm);
    feed_forward(layer, last);
  }

  void hand_out_mixed() {
    for (std::int64_t i = 0; i < count(); ++i) {
      if (token(i).mixed != nullptr) std::copy_n(scratch(i).x, sizes_.width, token(i).mixed);
    }
  }

  /// All projections of the mixer's input, and the convolution of each channel as it comes.
  void project(const DecodingLayer& layer, std::size_t number) {
    const auto& a = layer.attention;
    const auto& m = layer.memory;
    const auto keys = sizes_.keys();
    struct Target {
      const Weights& weights;
      float* Scratch::* out;
      std::int64_t channel;  // of the convolution, or −1
    };
    const Target targets[] = {
        {a.query, &Scratch::query, -1},    {a.key, &Scratch::key, -1},
        {a.value, &Scratch::value, -1},    {m.query, &Scratch::features, 0},
        {m.key, &Scratch::features, keys}, {m.value, &Scratch::features, 2 * keys},
        {m.gate, &Scratch::gate, -1},      {m.beta, &Scratch::beta, -1},
        {m.decay, &Scratch::decay, -1}};
    std::int64_t sizes[std::size(targets)];
    const auto each = rows_of_task<T>(sizes_.width);
    std::int64_t tasks = 0;
    for (std::size_t i = 0; i < std::size(targets); ++i) {
      sizes[i] = targets[i].weights.rows;
      tasks += divide_up(sizes[i], each);
    }
    team_.loop(tasks, [&](std::int64_t task) {
      const auto [matrix, first, count] = rows_at(sizes, each, task);
      const Target& target = targets[matrix];
      const auto out = std::max<std::int64_t>(target.channel, 0) + first;
      for_each_block([&, first = first, count = count](std::int64_t i, std::int64_t together) {
        multiply_rows<T>(target.weights, first, count, together, rows(&Scratch::normed, i),
                         rows(target.out, i, out));
        if (target.channel < 0) return;
        for (auto j = i; j < i + together; ++j) {
          float* x = scratch(j).features;
          const LayerTrace trace = trace_.layer(token(j).trace, number);
          if (trace.inputs != nullptr) std::copy_n(x + out, count, trace.inputs + out);
          convolve(m, state(j, number), x, out, count);
        }
      });
    });
  }

  /// Convolves channels in place and moves their inputs on by one token.
  void convolve(const DecodingMemory& m, const DecodingState& state, float* x, std::int64_t first,
                std::int64_t count) const {
    const auto channels = 2 * sizes_.keys() + sizes_.values();
    const auto past = sizes_.convolution_size - 1;
    T* inputs = static_cast<T*>(state.convolution);
    for (auto c = first; c < first + count; ++c) {
      float sum = 0.0f;
      for (std::int64_t tap = 0; tap < past; ++tap) {
        const T old = inputs[tap * channels + c];
        sum += to_float(old) * m.convolution[tap * channels + c];
        if (tap > 0) inputs[(tap - 1) * channels + c] = old;
      }
      sum += x[c] * m.convolution[past * channels + c];
      if (past > 0) store(x[c], inputs + (past - 1) * channels + c);
      x[c] = sum;
    }
    silu(x + first, nullptr, count, x + first);
  }

  /// The heads of the memory and of attention; tokens of one session follow each other.
  void run_heads(const DecodingLayer& layer, std::size_t number) {
    const auto memories = layer.memory.output.data ? sizes_.memory_value_heads : 0;
    const auto attentions = layer.attention.output.data ? sizes_.attention_heads : 0;
    const auto heads = memories + attentions;
    team_.loop(static_cast<std::int64_t>(runs_.size()) * heads, [&](std::int64_t task) {
      const Run run = runs_[static_cast<std::size_t>(task / heads)];
      const auto head = task % heads;
      for (auto i = run.first; i < run.first + run.count; ++i) {
        if (head < memories) {
          recall(layer.memory, number, i, head);
        } else {
          attend(layer.attention, number, i, head - memories);
        }
      }
    });
  }

  /// One head of the memory: the write, the read, the gated norm.
  void recall(const DecodingMemory& m, std::size_t number, std::int64_t i, std::int64_t head) {
    const DecodingState& state = this->state(i, number);
    const Scratch& s = scratch(i);
    const auto K = sizes_.memory_key_size;
    const auto V = sizes_.memory_value_size;
    const auto key_head = head / (sizes_.memory_value_heads / sizes_.memory_heads);
    alignas(64) float q[kMaxHeadSize];
    alignas(64) float k[kMaxHeadSize];
    alignas(64) float o[kMaxHeadSize];
    const float* query = s.features + key_head * K;
    const float* key = s.features + sizes_.keys() + key_head * K;
    const float* value = s.features + 2 * sizes_.keys() + head * V;
    const float scale = 1.0f / std::sqrt(static_cast<float>(K));
    scale_row(query, inverse_norm(query, K) * scale, K, q);
    scale_row(key, inverse_norm(key, K), K, k);
    const auto [decay, beta] =
        write_of_head(model_, m, s.beta[head], s.decay[head], token(i).strength, head);
    step_token(Token<float>{q, k, decay, beta, dot(q, k, K)}, K, V, value,
               state.memory + head * K * V, o);
    float* out = s.recalled + head * V;
    norm(o, m.norm, V, sizes_.norm_epsilon, o);
    silu(s.gate + head * V, o, V, out);
    const LayerTrace trace = trace_.layer(token(i).trace, number);
    if (trace.features == nullptr) return;
    if (head % (sizes_.memory_value_heads / sizes_.memory_heads) == 0) {
      std::copy_n(key, K, trace.features + sizes_.keys() + key_head * K);
    }
    std::copy_n(value, V, trace.features + 2 * sizes_.keys() + head * V);
    trace.beta[head] = s.beta[head];
    trace.decay[head] = s.decay[head];
  }

  /// One head of attention, over the sinks and the ring. The token's own key and value go into the
  /// ring, and are read as they were before they were rounded.
  void attend(const DecodingAttention& a, std::size_t number, std::int64_t token_index,
              std::int64_t head) {
    const DecodingState& state = this->state(token_index, number);
    const Scratch& s = scratch(token_index);
    const auto position = token(token_index).position;
    const auto size = head_size();
    const auto sinks = sizes_.attention_sinks;
    const auto slot = position % sizes_.attention_window;
    const auto seen = std::min(position + 1, sizes_.attention_window);
    float* query = s.query + head * size;
    float* key = s.key + head * size;
    rotate_head(s.angles, query);
    rotate_head(s.angles, key);
    scale_row(query, 1.0f / std::sqrt(static_cast<float>(size)), size, query);
    T* keys = static_cast<T*>(state.key) + head * size;
    T* values = static_cast<T*>(state.value) + head * size;
    for (std::int64_t i = 0; i < size; ++i) {
      store(key[i], keys + slot * sizes_.width + i);
      store(s.value[head * size + i], values + slot * sizes_.width + i);
    }
    if (const auto trace = trace_.layer(token(token_index).trace, number); trace.key != nullptr) {
      std::copy_n(key, size, trace.key + head * size);
      std::copy_n(s.value + head * size, size, trace.value + head * size);
    }
    float* scores = s.scores + head * layout_.scores_stride();
    const float* sink_keys = a.sink_key + head * sinks * (size / 2);
    for (std::int64_t i = 0; i < sinks; ++i) {
      scores[i] = dot(query + size / 2, sink_keys + i * (size / 2), size / 2);
    }
    multiply_vectors<T>(keys, sizes_.width, size, seen, 1, {query, 0}, {scores + sinks, 0});
    scores[sinks + slot] = dot(query, key, size);
    const float sum = exponentials(scores, sinks + seen);
    float* out = s.attended + head * size;
    std::fill_n(out, size, 0.0f);
    for (std::int64_t i = 0; i < sinks; ++i) {
      add_scaled(a.sink_value + (head * sinks + i) * size, scores[i], size, out);
    }
    for (std::int64_t i = 0; i < seen; ++i) {
      if (i != slot) add_scaled(values + i * sizes_.width, scores[sinks + i], size, out);
    }
    add_scaled(s.value + head * size, scores[sinks + slot], size, out);
    scale_row(out, 1.0f / sum, size, out);
  }

  void rotate_head(const float* angles, float* row) const {
    const auto pairs = head_size() / 4;
    for (std::int64_t i = 0; i < pairs; ++i) {
      const float a = row[i];
      const float b = row[i + pairs];
      row[i] = a * angles[i] - b * angles[pairs + i];
      row[i + pairs] = b * angles[i] + a * angles[pairs + i];
    }
  }

  /// scores ← exp(score − max); returns their sum. The row has room for a whole vector behind it.
  static float exponentials(float* scores, std::int64_t count) {
    const Float d;
    const float largest = *std::max_element(scores, scores + count);
    std::fill_n(scores + count, lanes(), -1e30f);
    auto sum = hn::Zero(d);
    for (std::int64_t i = 0; i < count; i += lanes()) {
      const auto weight = hn::Exp(d, hn::Sub(hn::LoadU(d, scores + i), hn::Set(d, largest)));
      hn::StoreU(weight, d, scores + i);
      sum = hn::Add(sum, weight);
    }
    return hn::GetLane(hn::SumOfLanes(d, sum));
  }

  template <class U>
  static void add_scaled(const U* row, float factor, std::int64_t size, float* out) {
    const Float d;
    const auto f = hn::Set(d, factor);
    std::int64_t i = 0;
    for (; i + lanes() <= size; i += lanes()) {
      hn::StoreU(hn::MulAdd(f, load(row + i), hn::LoadU(d, out + i)), d, out + i);
    }
    for (; i < size; ++i) out[i] += factor * to_float(row[i]);
  }

  /// x ← x + mix ⊙ output(branch), for each branch.
  void mix(const DecodingLayer& layer) {
    const auto& a = layer.attention;
    const auto& m = layer.memory;
    const auto each = rows_of_task<T>(std::max(a.output.columns, m.output.columns));
    team_.loop(divide_up(sizes_.width, each), [&](std::int64_t task) {
      const auto first = task * each;
      const auto count = std::min(each, sizes_.width - first);
      if (a.output.data) add_product(a.output, &Scratch::attended, a.mix, first, count);
      if (m.output.data) add_product(m.output, &Scratch::recalled, m.mix, first, count);
    });
  }

  /// Rows of a matrix whose products fit into a buffer on the stack.
  static constexpr std::int64_t kPiece = 64;

  /// x ← x + factor ⊙ (matrix · from), rows [first, first + count); `factor` may be null.
  void add_product(const Weights& matrix, float* Scratch::* from, const float* factor,
                   std::int64_t first, std::int64_t count) {
    alignas(64) float products[kBlock * kPiece];
    for_each_block([&](std::int64_t at, std::int64_t together) {
      for (auto row = first; row < first + count; row += kPiece) {
        const auto size = std::min(kPiece, first + count - row);
        multiply_rows<T>(matrix, row, size, together, rows(from, at), {products, kPiece});
        for (std::int64_t i = 0; i < together; ++i) {
          add_row(products + i * kPiece, factor != nullptr ? factor + row : nullptr, size,
                  scratch(at + i).x + row);
        }
      }
    });
  }

  static void add_row(const float* product, const float* factor, std::int64_t size, float* x) {
    for (std::int64_t i = 0; i < size; ++i) {
      x[i] += factor != nullptr ? factor[i] * product[i] : product[i];
    }
  }

  void feed_forward(const DecodingLayer& layer, bool last) {
    const auto hidden = sizes_.feed_forward_width;
    const auto each = rows_of_task<T>(2 * sizes_.width);
    team_.loop(divide_up(hidden, each), [&](std::int64_t task) {
      const auto first = task * each;
      expand(layer, last, first, std::min(each, hidden - first));
    });
    const auto per_task = rows_of_task<T>(hidden);
    team_.loop(divide_up(sizes_.width, per_task), [&](std::int64_t task) {
      const auto first = task * per_task;
      add_product(layer.down, &Scratch::hidden, nullptr, first,
                  std::min(per_task, sizes_.width - first));
    });
  }

  /// hidden ← silu(gate · x) ⊙ (up · x), rows [first, first + count).
  void expand(const DecodingLayer& layer, bool last, std::int64_t first, std::int64_t count) {
    alignas(64) float up[kBlock * kPiece];
    for_each_block([&](std::int64_t at, std::int64_t together) {
      const Vectors x = rows(&Scratch::normed, at);
      for (auto row = first; row < first + count; row += kPiece) {
        const auto size = std::min(kPiece, first + count - row);
        multiply_rows<T>(layer.gate, row, size, together, x, rows(&Scratch::hidden, at, row));
        multiply_rows<T>(layer.up, row, size, together, x, {up, kPiece});
        for (std::int64_t i = 0; i < together; ++i) {
          float* out = scratch(at + i).hidden + row;
          if (last) add_delta(at + i, row, size, out, up + i * kPiece);
          silu(out, up + i * kPiece, size, out);
        }
      }
    });
  }

  /// What the session adds to rows [row, row + size) of both projections.
  void add_delta(std::int64_t i, std::int64_t row, std::int64_t size, float* gate, float* up) {
    const float* delta = token(i).feed_forward_delta;
    if (delta == nullptr) return;
    const auto width = sizes_.width;
    alignas(64) float products[kPiece];
    for (float* out : {gate, up}) {
      multiply_vectors(delta + row * width, width, width, size, 1, rows(&Scratch::normed, i),
                       {products, kPiece});
      for (std::int64_t c = 0; c < size; ++c) out[c] += products[c];
      delta += sizes_.feed_forward_width * width;
    }
  }

  const DecodingModel& model_;
  const DecodingSizes& sizes_;
  std::span<const DecodingToken> tokens_;
  std::vector<Run> runs_;
  ScratchLayout layout_;
  TraceLayout trace_;
  std::vector<Scratch> s_;
  Team& team_;
};

/// Moves the state of a session on by what the traces of some tokens say.
template <class T>
class Keeper {
 public:
  Keeper(const DecodingModel& model, std::span<const DecodingToken> tokens, Team& team)
      : model_(model), sizes_(model.sizes), tokens_(tokens), trace_(model), team_(team) {}

  void run() {
    for (std::size_t number = 0; number < model_.layers.size(); ++number) {
      const DecodingLayer& layer = model_.layers[number];
      const auto memories = layer.memory.output.data ? sizes_.memory_value_heads : 0;
      const auto rings = layer.attention.output.data ? 1 : 0;
      team_.loop(memories + rings, [&](std::int64_t task) {
        if (task < memories) {
          write(layer.memory, number, task);
        } else {
          fill_ring(number);
        }
      });
      if (memories > 0) move_inputs(number);
    }
    if (model_.fast_head) keep_head();
  }

 private:
  const DecodingState& state(std::size_t number) const { return tokens_.front().states[number]; }

  void write(const DecodingMemory& m, std::size_t number, std::int64_t head) const {
    const auto K = sizes_.memory_key_size;
    const auto V = sizes_.memory_value_size;
    const auto key_head = head / (sizes_.memory_value_heads / sizes_.memory_heads);
    alignas(64) float k[kMaxHeadSize];
    alignas(64) float o[kMaxHeadSize];
    for (const DecodingToken& token : tokens_) {
      const LayerTrace trace = trace_.layer(token.trace, number);
      const float* key = trace.features + sizes_.keys() + key_head * K;
      scale_row(key, inverse_norm(key, K), K, k);
      const auto [decay, beta] =
          write_of_head(model_, m, trace.beta[head], trace.decay[head], token.strength, head);
      step_token(Token<float>{k, k, decay, beta, 0.0f}, K, V,
                 trace.features + 2 * sizes_.keys() + head * V, state(number).memory + head * K * V,
                 o);
    }
  }

  void fill_ring(std::size_t number) const {
    T* keys = static_cast<T*>(state(number).key);
    T* values = static_cast<T*>(state(number).value);
    for (const DecodingToken& token : tokens_) {
      const LayerTrace trace = trace_.layer(token.trace, number);
      const auto row = token.position % sizes_.attention_window * sizes_.width;
      for (std::int64_t i = 0; i < sizes_.width; ++i) {
        store(trace.key[i], keys + row + i);
        store(trace.value[i], values + row + i);
      }
    }
  }

  void move_inputs(std::size_t number) const {
    const auto channels = 2 * sizes_.keys() + sizes_.values();
    const auto past = sizes_.convolution_size - 1;
    if (past == 0) return;
    T* inputs = static_cast<T*>(state(number).convolution);
    for (const DecodingToken& token : tokens_) {
      std::copy(inputs + channels, inputs + past * channels, inputs);
      const float* newest = trace_.layer(token.trace, number).inputs;
      for (std::int64_t c = 0; c < channels; ++c) {
        store(newest[c], inputs + (past - 1) * channels + c);
      }
    }
  }

  void keep_head() {
    const DecodingHeadState& head = tokens_.front().head;
    const auto vocabulary = model_.output.rows;
    const auto each = softmax_delta::kColumns;
    team_.loop(divide_up(vocabulary, each), [&](std::int64_t task) {
      const auto begin = task * each;
      const auto end = std::min(vocabulary, begin + each);
      for (const DecodingToken& token : tokens_) {
        const HeadTrace trace = trace_.head(token.trace);
        write_head(model_, head.state, token.strength, trace.key, trace.error, begin, end);
      }
    });
    const HeadTrace last = trace_.head(tokens_.back().trace);
    T* hidden = static_cast<T*>(head.hidden);
    for (std::int64_t i = 0; i < sizes_.width; ++i) store(last.hidden[i], hidden + i);
    std::copy_n(last.logits, vocabulary, head.logits);
  }

  const DecodingModel& model_;
  const DecodingSizes& sizes_;
  std::span<const DecodingToken> tokens_;
  TraceLayout trace_;
  Team& team_;
};

void decode(const DecodingModel& model, std::span<const DecodingToken> tokens, float* scratch,
            float* logits, const Executor& executor) {
  Team::run(executor, [&](Team& team) {
    if (model.dtype == DType::kBFloat16) {
      Decoder<hwy::bfloat16_t>(model, tokens, scratch, team).run(logits);
    } else {
      Decoder<float>(model, tokens, scratch, team).run(logits);
    }
  });
}

void keep(const DecodingModel& model, std::span<const DecodingToken> tokens,
          const Executor& executor) {
  Team::run(executor, [&](Team& team) {
    if (model.dtype == DType::kBFloat16) {
      Keeper<hwy::bfloat16_t>(model, tokens, team).run();
    } else {
      Keeper<float>(model, tokens, team).run();
    }
  });
}

std::int64_t scratch_size(const DecodingModel& model) { return ScratchLayout(model).size(); }
std::int64_t trace_size(const DecodingModel& model) { return TraceLayout(model).size(); }

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(decode);
HWY_EXPORT(keep);
HWY_EXPORT(scratch_size);
HWY_EXPORT(trace_size);

}  // namespace fastweights::core

namespace fastweights::cpu {

std::int64_t decoding_scratch(const DecodingModel& model, std::int64_t tokens) {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  return tokens * HWY_DYNAMIC_DISPATCH(scratch_size)(model);
}

std::int64_t decoding_trace(const DecodingModel& model) {
  using namespace core;
  return HWY_DYNAMIC_DISPATCH(trace_size)(model);
}

void keep_tokens(const DecodingModel& model, std::span<const DecodingToken> tokens,
                 const Executor& executor) {
  using namespace core;
  if (!tokens.empty()) HWY_DYNAMIC_DISPATCH(keep)(model, tokens, executor);
}

void decode_tokens(const DecodingModel& model, std::span<const DecodingToken> tokens,
                   float* scratch, float* logits, const Executor& executor) {
  using namespace core;
  if (!tokens.empty()) HWY_DYNAMIC_DISPATCH(decode)(model, tokens, scratch, logits, executor);
}

void decode_token(const DecodingModel& model, std::int64_t token, std::int64_t position,
                  float strength, const std::vector<DecodingState>& states, float* scratch,
                  float* logits, const Executor& executor, const DecodingHeadState& head,
                  float* hidden) {
  const DecodingToken one{token, position, strength, states.data(), head, hidden};
  decode_tokens(model, {&one, 1}, scratch, logits, executor);
}

}  // namespace fastweights::cpu

#endif  // HWY_ONCE
