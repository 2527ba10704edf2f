// One token through a language model. Every loop over a team's threads is cut the same way for any
// number of them, and every row of a product is summed in the same order.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "decoding_kernels.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
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

// ---- products with a vector

/// Bytes of weights that one task streams: enough to outweigh the taking of a task.
constexpr std::int64_t kTaskBytes = 32768;
/// Rows that are read at a time.
constexpr int kRows = 4;

/// out[i] ← row i · x, for rows of `columns` elements. What comes `kRows` rows later is asked for.
template <int kCount, class T>
HWY_INLINE void dot_rows(const T* HWY_RESTRICT rows, std::int64_t columns,
                         const float* HWY_RESTRICT x, float* HWY_RESTRICT out) {
  const Float d;
  const auto step = lanes();
  hn::Vec<Float> even[kCount], odd[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) even[i] = odd[i] = hn::Zero(d);
  std::int64_t c = 0;
  for (; c + 2 * step <= columns; c += 2 * step) {
    const auto first = hn::LoadU(d, x + c);
    const auto second = hn::LoadU(d, x + c + step);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const T* at = rows + i * columns + c;
      hwy::Prefetch(at + kRows * columns);
      if constexpr (sizeof(T) == 4) hwy::Prefetch(at + kRows * columns + step);
      even[i] = hn::MulAdd(load(at), first, even[i]);
      odd[i] = hn::MulAdd(load(at + step), second, odd[i]);
    }
  }
  for (; c + step <= columns; c += step) {
    const auto first = hn::LoadU(d, x + c);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      even[i] = hn::MulAdd(load(rows + i * columns + c), first, even[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(even[i], odd[i])));
    for (auto rest = c; rest < columns; ++rest) sum += to_float(rows[i * columns + rest]) * x[rest];
    out[i] = sum;
  }
}

/// out[0 … count) ← rows [first, first + count) of the matrix times x.
template <class T>
void multiply_rows(const Weights& matrix, std::int64_t first, std::int64_t count, const float* x,
                   float* out) {
  const T* rows = static_cast<const T*>(matrix.data) + first * matrix.columns;
  std::int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    dot_rows<kRows>(rows + i * matrix.columns, matrix.columns, x, out + i);
  }
  for (; i < count; ++i) dot_rows<1>(rows + i * matrix.columns, matrix.columns, x, out + i);
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

/// Rows of scratch memory, each a multiple of 16 elements.
struct Scratch {
  explicit Scratch(const DecodingModel& model) {
    const auto& s = model.sizes;
    const auto scores = s.attention_sinks + s.attention_window;
    const auto place = [&](float* Scratch::* member, std::int64_t size) {
      members.push_back({member, total});
      total += (size + 31) / 16 * 16;
    };
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
    scores_stride = (scores + 31) / 16 * 16;
    place(&Scratch::scores, scores_stride * s.attention_heads);
    if (!model.fast_head) return;
    place(&Scratch::head_key, s.width);
    place(&Scratch::head_error, model.output.rows);
  }

  void start_at(float* memory) {
    for (const auto& [member, offset] : members) this->*member = memory + offset;
  }

  struct Place {
    float* Scratch::* member;
    std::int64_t offset;
  };
  std::vector<Place> members;
  std::int64_t total = 0;
  std::int64_t scores_stride = 0;
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

/// Everything of one token; `T` is the model's type.
template <class T>
class Decoder {
 public:
  Decoder(const DecodingModel& model, std::int64_t position, float strength, Scratch& scratch,
          Team& team)
      : model_(model),
        sizes_(model.sizes),
        position_(position),
        strength_(strength),
        s_(scratch),
        team_(team) {}

  void run(std::int64_t token, const std::vector<DecodingState>& states,
           const DecodingHeadState& head, float* logits, float* hidden) {
    const T* row = static_cast<const T*>(model_.embedding.data) + token * sizes_.width;
    for (std::int64_t i = 0; i < sizes_.width; ++i) s_.x[i] = to_float(row[i]);
    fill_angles();
    for (std::size_t layer = 0; layer < model_.layers.size(); ++layer) {
      run_layer(model_.layers[layer], states[layer]);
    }
    norm(s_.x, model_.norm, sizes_.width, sizes_.norm_epsilon, s_.normed);
    if (hidden != nullptr) std::copy_n(s_.normed, sizes_.width, hidden);
    const auto each = rows_of_task<T>(sizes_.width);
    team_.loop(divide_up(model_.output.rows, each), [&](std::int64_t task) {
      const auto first = task * each;
      multiply_rows<T>(model_.output, first, std::min(each, model_.output.rows - first), s_.normed,
                       logits + first);
    });
    if (model_.fast_head) correct(token, head, logits);
  }

 private:
  /// Writes `token` into the memory at the head, for the hidden state that predicted it, reads the
  /// memory for the new one and leaves that to be written next.
  void correct(std::int64_t token, const DecodingHeadState& head, float* logits) {
    const auto width = sizes_.width;
    const auto vocabulary = model_.output.rows;
    const float eta = std::min(static_cast<float>(model_.head_eta) * strength_, 2.0f);
    const auto shrink = static_cast<float>(
        std::expm1(model_.head_decay * std::min(static_cast<double>(strength_), 1.0)));
    T* hidden = static_cast<T*>(head.hidden);
    for (std::int64_t i = 0; i < width; ++i) s_.head_key[i] = to_float(hidden[i]);
    scale_row(s_.head_key, eta * inverse_norm(s_.head_key, width), width, s_.head_key);
    if (eta != 0.0f) {
      softmax_delta::prediction_error(head.logits, token, vocabulary, s_.head_error);
    }
    // As the modules have it: the hidden state in the model's type.
    for (std::int64_t i = 0; i < width; ++i) {
      store(s_.normed[i], hidden + i);
      s_.normed[i] = to_float(hidden[i]);
    }
    scale_row(s_.normed, inverse_norm(s_.normed, width), width, s_.normed);
    using softmax_delta::kColumns;
    team_.loop(divide_up(vocabulary, kColumns), [&](std::int64_t task) {
      const auto begin = task * kColumns;
      const auto end = std::min(vocabulary, begin + kColumns);
      if (eta != 0.0f || shrink != 0.0f) {
        softmax_delta::multiply<float>({.rows = width,
                                        .inner = eta != 0.0f ? 1 : 0,
                                        .left = s_.head_key,
                                        .left_row = 1,
                                        .left_inner = width,
                                        .right = s_.head_error,
                                        .right_stride = vocabulary,
                                        .base = head.state,
                                        .base_stride = vocabulary,
                                        .shrink = shrink,
                                        .out = head.state,
                                        .out_stride = vocabulary},
                                       begin, end);
      }
      softmax_delta::multiply<float>({.rows = 1,
                                      .inner = width,
                                      .left = s_.normed,
                                      .left_row = width,
                                      .left_inner = 1,
                                      .right = head.state,
                                      .right_stride = vocabulary,
                                      .base = logits,
                                      .base_stride = vocabulary,
                                      .out = logits,
                                      .out_stride = vocabulary},
                                     begin, end);
    });
    std::copy_n(logits, vocabulary, head.logits);
  }

  void run_layer(const DecodingLayer& layer, const DecodingState& state) {
    norm(s_.x, layer.mixer_norm, sizes_.width, sizes_.norm_epsilon, s_.normed);
    project(layer, state);
    run_heads(layer, state);
    mix(layer);
    norm(s_.x, layer.feed_forward_norm, sizes_.width, sizes_.norm_epsilon, s_.normed);
    feed_forward(layer);
  }

  // The angles of RotaryTable for a call of one token.
  void fill_angles() {
    if (sizes_.attention_heads == 0) return;
    const auto pairs = head_size() / 4;
    for (std::int64_t i = 0; i < pairs; ++i) {
      const double frequency =
          std::pow(sizes_.rope_base, -static_cast<double>(i) / static_cast<double>(pairs));
      const double angle = static_cast<double>(position_) * frequency;
      s_.angles[i] = static_cast<float>(std::cos(angle));
      s_.angles[pairs + i] = static_cast<float>(std::sin(angle));
    }
  }

  std::int64_t head_size() const { return sizes_.width / sizes_.attention_heads; }

  /// All projections of the mixer's input, and the convolution of each channel as it comes.
  void project(const DecodingLayer& layer, const DecodingState& state) {
    const auto& a = layer.attention;
    const auto& m = layer.memory;
    const auto keys = sizes_.keys();
    struct Target {
      const Weights& weights;
      float* out;
      std::int64_t channel;  // of the convolution, or −1
    };
    const Target targets[] = {{a.query, s_.query, -1},
                              {a.key, s_.key, -1},
                              {a.value, s_.value, -1},
                              {m.query, s_.features, 0},
                              {m.key, s_.features + keys, keys},
                              {m.value, s_.features + 2 * keys, 2 * keys},
                              {m.gate, s_.gate, -1},
                              {m.beta, s_.beta, -1},
                              {m.decay, s_.decay, -1}};
    std::int64_t rows[std::size(targets)];
    const auto each = rows_of_task<T>(sizes_.width);
    std::int64_t tasks = 0;
    for (std::size_t i = 0; i < std::size(targets); ++i) {
      rows[i] = targets[i].weights.rows;
      tasks += divide_up(rows[i], each);
    }
    team_.loop(tasks, [&](std::int64_t task) {
      const auto [matrix, first, count] = rows_at(rows, each, task);
      const Target& target = targets[matrix];
      multiply_rows<T>(target.weights, first, count, s_.normed, target.out + first);
      if (target.channel < 0) return;
      convolve(m, state, target.channel + first, count);
    });
  }

  /// Convolves channels in place and moves their inputs on by one token.
  void convolve(const DecodingMemory& m, const DecodingState& state, std::int64_t first,
                std::int64_t count) {
    const auto channels = 2 * sizes_.keys() + sizes_.values();
    const auto past = sizes_.convolution_size - 1;
    T* inputs = static_cast<T*>(state.convolution);
    float* x = s_.features;
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

  void run_heads(const DecodingLayer& layer, const DecodingState& state) {
    const auto memories = layer.memory.output.data ? sizes_.memory_value_heads : 0;
    const auto attentions = layer.attention.output.data ? sizes_.attention_heads : 0;
    team_.loop(memories + attentions, [&](std::int64_t task) {
      if (task < memories) {
        recall(layer.memory, state, task);
      } else {
        attend(layer.attention, state, task - memories);
      }
    });
  }

  /// One head of the memory: the write, the read, the gated norm.
  void recall(const DecodingMemory& m, const DecodingState& state, std::int64_t head) {
    const auto K = sizes_.memory_key_size;
    const auto V = sizes_.memory_value_size;
    const auto key_head = head / (sizes_.memory_value_heads / sizes_.memory_heads);
    alignas(64) float q[kMaxHeadSize];
    alignas(64) float k[kMaxHeadSize];
    alignas(64) float o[kMaxHeadSize];
    const float* query = s_.features + key_head * K;
    const float* key = s_.features + sizes_.keys() + key_head * K;
    const float scale = 1.0f / std::sqrt(static_cast<float>(K));
    scale_row(query, inverse_norm(query, K) * scale, K, q);
    scale_row(key, inverse_norm(key, K), K, k);
    const float trained =
        static_cast<float>(sizes_.beta_max) / (1.0f + std::exp(-std::max(s_.beta[head], -87.0f)));
    const float beta = std::min(trained * strength_, 2.0f);
    const Token<float> token{q, k, decay_of_head(m, head), beta, dot(q, k, K)};
    step_token(token, K, V, s_.features + 2 * sizes_.keys() + head * V, state.memory + head * K * V,
               o);
    float* out = s_.recalled + head * V;
    norm(o, m.norm, V, sizes_.norm_epsilon, o);
    silu(s_.gate + head * V, o, V, out);
  }

  float decay_of_head(const DecodingMemory& m, std::int64_t head) const {
    if (m.decay.data == nullptr || strength_ == 0.0f) return 1.0f;
    const float x = s_.decay[head] + m.dt_bias[head];
    const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
    return std::exp(-std::exp(m.a_log[head]) * softplus * std::min(strength_, 1.0f));
  }

  /// One head of attention, over the sinks and the ring. The token's own key and value go into the
  /// ring, and are read as they were before they were rounded.
  void attend(const DecodingAttention& a, const DecodingState& state, std::int64_t head) {
    const auto size = head_size();
    const auto sinks = sizes_.attention_sinks;
    const auto slot = position_ % sizes_.attention_window;
    const auto seen = std::min(position_ + 1, sizes_.attention_window);
    float* query = s_.query + head * size;
    float* key = s_.key + head * size;
    rotate_head(query);
    rotate_head(key);
    scale_row(query, 1.0f / std::sqrt(static_cast<float>(size)), size, query);
    T* keys = static_cast<T*>(state.key) + head * size;
    T* values = static_cast<T*>(state.value) + head * size;
    for (std::int64_t i = 0; i < size; ++i) {
      store(key[i], keys + slot * sizes_.width + i);
      store(s_.value[head * size + i], values + slot * sizes_.width + i);
    }
    float* scores = s_.scores + head * s_.scores_stride;
    const float* sink_keys = a.sink_key + head * sinks * (size / 2);
    for (std::int64_t i = 0; i < sinks; ++i) {
      scores[i] = dot(query + size / 2, sink_keys + i * (size / 2), size / 2);
    }
    for (std::int64_t i = 0; i < seen; ++i) {
      dot_rows<1>(keys + i * sizes_.width, size, query, scores + sinks + i);
    }
    scores[sinks + slot] = dot(query, key, size);
    const float sum = exponentials(scores, sinks + seen);
    float* out = s_.attended + head * size;
    std::fill_n(out, size, 0.0f);
    for (std::int64_t i = 0; i < sinks; ++i) {
      add_scaled(a.sink_value + (head * sinks + i) * size, scores[i], size, out);
    }
    for (std::int64_t i = 0; i < seen; ++i) {
      if (i != slot) add_scaled(values + i * sizes_.width, scores[sinks + i], size, out);
    }
    add_scaled(s_.value + head * size, scores[sinks + slot], size, out);
    scale_row(out, 1.0f / sum, size, out);
  }

  void rotate_head(float* row) const {
    const auto pairs = head_size() / 4;
    for (std::int64_t i = 0; i < pairs; ++i) {
      const float a = row[i];
      const float b = row[i + pairs];
      row[i] = a * s_.angles[i] - b * s_.angles[pairs + i];
      row[i + pairs] = b * s_.angles[i] + a * s_.angles[pairs + i];
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
      if (a.output.data) add_product(a.output, s_.attended, a.mix, first, count);
      if (m.output.data) add_product(m.output, s_.recalled, m.mix, first, count);
    });
  }

  /// x ← x + factor ⊙ (matrix · from), rows [first, first + count); `factor` may be null.
  void add_product(const Weights& matrix, const float* from, const float* factor,
                   std::int64_t first, std::int64_t count) {
    constexpr std::int64_t kPiece = 64;
    float product[kPiece];
    for (auto row = first; row < first + count; row += kPiece) {
      const auto rows = std::min(kPiece, first + count - row);
      multiply_rows<T>(matrix, row, rows, from, product);
      for (std::int64_t i = 0; i < rows; ++i) {
        s_.x[row + i] += factor != nullptr ? factor[row + i] * product[i] : product[i];
      }
    }
  }

  void feed_forward(const DecodingLayer& layer) {
    const auto hidden = sizes_.feed_forward_width;
    const auto each = rows_of_task<T>(2 * sizes_.width);
    team_.loop(divide_up(hidden, each), [&](std::int64_t task) {
      constexpr std::int64_t kPiece = 64;
      float up[kPiece];
      const auto end = std::min(hidden, (task + 1) * each);
      for (auto row = task * each; row < end; row += kPiece) {
        const auto rows = std::min(kPiece, end - row);
        multiply_rows<T>(layer.gate, row, rows, s_.normed, s_.hidden + row);
        multiply_rows<T>(layer.up, row, rows, s_.normed, up);
        silu(s_.hidden + row, up, rows, s_.hidden + row);
      }
    });
    const auto per_task = rows_of_task<T>(hidden);
    team_.loop(divide_up(sizes_.width, per_task), [&](std::int64_t task) {
      const auto first = task * per_task;
      add_product(layer.down, s_.hidden, nullptr, first, std::min(per_task, sizes_.width - first));
    });
  }

  const DecodingModel& model_;
  const DecodingSizes& sizes_;
  std::int64_t position_;
  float strength_;
  Scratch& s_;
  Team& team_;
};

void decode(const DecodingModel& model, std::int64_t token, std::int64_t position, float strength,
            const std::vector<DecodingState>& states, float* memory, float* logits,
            const Executor& executor, const DecodingHeadState& head, float* hidden) {
  Scratch scratch(model);
  scratch.start_at(memory);
  Team::run(executor, [&](Team& team) {
    if (model.dtype == DType::kBFloat16) {
      Decoder<hwy::bfloat16_t>(model, position, strength, scratch, team)
          .run(token, states, head, logits, hidden);
    } else {
      Decoder<float>(model, position, strength, scratch, team)
          .run(token, states, head, logits, hidden);
    }
  });
}

std::int64_t scratch_size(const DecodingModel& model) { return Scratch(model).total; }

}  // namespace
}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace fastweights::core {

HWY_EXPORT(decode);
HWY_EXPORT(scratch_size);

}  // namespace fastweights::core

namespace fastweights::cpu {

std::int64_t decoding_scratch(const DecodingModel& model) {
  using namespace core;  // HWY_DYNAMIC_DISPATCH takes an unqualified name
  return HWY_DYNAMIC_DISPATCH(scratch_size)(model);
}

void decode_token(const DecodingModel& model, std::int64_t token, std::int64_t position,
                  float strength, const std::vector<DecodingState>& states, float* scratch,
                  float* logits, const Executor& executor, const DecodingHeadState& head,
                  float* hidden) {
  using namespace core;
  HWY_DYNAMIC_DISPATCH(decode)
  (model, token, position, strength, states, scratch, logits, executor, head, hidden);
}

}  // namespace fastweights::cpu

#endif  // HWY_ONCE
