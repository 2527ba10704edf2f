#include "decoder.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <limits>
#include <optional>
#include <utility>

#include "../ops/layer_op.hpp"

namespace fastweights::detail {
namespace {

using nn::LanguageModelConfig;

/// Takes the tensors of a model, as long as each is what it should be.
class Taker {
 public:
  explicit Taker(at::ScalarType type) : type_(type) {}

  bool fits() const { return fits_; }
  std::vector<at::Tensor> kept() && { return std::move(kept_); }

  cpu::Weights matrix(const at::Tensor& weight, std::int64_t rows, std::int64_t columns) {
    if (!check(weight, {rows, columns})) return {};
    kept_.push_back(weight.detach());  // keeps the storage, even if the parameter gets another
    return {weight.const_data_ptr(), rows, columns};
  }

  cpu::Weights matrix(const torch::nn::Linear& linear, std::int64_t rows, std::int64_t columns) {
    fits_ = fits_ && !linear.is_empty() && !linear->bias.defined();
    return fits_ ? matrix(linear->weight, rows, columns) : cpu::Weights{};
  }

  /// An fp32 copy.
  const float* vector(const at::Tensor& tensor, at::IntArrayRef sizes) {
    if (!check(tensor, sizes)) return nullptr;
    return keep(tensor);
  }

  /// The same of the transpose.
  const float* transposed(const at::Tensor& tensor, at::IntArrayRef sizes) {
    if (!check(tensor, sizes)) return nullptr;
    return keep(tensor.t());
  }

 private:
  bool check(const at::Tensor& tensor, at::IntArrayRef sizes) {
    fits_ = fits_ && tensor.defined() && tensor.device().is_cpu() && tensor.sizes() == sizes &&
            tensor.scalar_type() == type_ && tensor.is_contiguous();
    return fits_;
  }

  const float* keep(const at::Tensor& tensor) {
    kept_.push_back(tensor.detach().to(at::kFloat, false, /*copy=*/true).contiguous());
    return kept_.back().const_data_ptr<float>();
  }

  at::ScalarType type_;
  bool fits_ = true;
  std::vector<at::Tensor> kept_;
};

cpu::DecodingSizes sizes_of(const LanguageModelConfig& config) {
  cpu::DecodingSizes sizes;
  sizes.width = config.width;
  sizes.feed_forward_width = config.feed_forward_width;
  if (config.attention) {
    sizes.attention_heads = config.attention_heads;
    sizes.attention_window = config.attention_window;
    sizes.attention_sinks = config.attention_sinks;
    sizes.rope_base = config.rope_base;
  }
  if (config.memory) {
    sizes.memory_heads = config.memory_heads;
    sizes.memory_value_heads = config.memory_value_heads;
    sizes.memory_key_size = config.memory_key_size;
    sizes.memory_value_size = config.memory_value_size;
    sizes.convolution_size = config.convolution_size;
    sizes.beta_max = config.beta_max;
  }
  sizes.norm_epsilon = config.norm_epsilon;
  return sizes;
}

cpu::DecodingAttention attention_of(const nn::BlockImpl& block, const cpu::DecodingSizes& s,
                                    Taker& take) {
  const auto& from = *block.attention;
  const auto size = s.width / s.attention_heads;
  return {take.matrix(from.query, s.width, s.width),
          take.matrix(from.key, s.width, s.width),
          take.matrix(from.value, s.width, s.width),
          take.matrix(from.output, s.width, s.width),
          take.vector(from.sink_key, {s.attention_heads, s.attention_sinks, size / 2}),
          take.vector(from.sink_value, {s.attention_heads, s.attention_sinks, size}),
          take.vector(block.mix_attention, {s.width})};
}

cpu::DecodingMemory memory_of(const nn::BlockImpl& block, const cpu::DecodingSizes& s, bool gated,
                              Taker& take) {
  const auto& from = *block.memory;
  const auto heads = s.memory_value_heads;
  cpu::DecodingMemory memory;
  memory.query = take.matrix(from.query, s.keys(), s.width);
  memory.key = take.matrix(from.key, s.keys(), s.width);
  memory.value = take.matrix(from.value, s.values(), s.width);
  memory.beta = take.matrix(from.beta, heads, s.width);
  memory.gate = take.matrix(from.gate, s.values(), s.width);
  memory.output = take.matrix(from.output, s.width, s.values());
  memory.convolution =
      take.transposed(from.convolution_weight, {2 * s.keys() + s.values(), s.convolution_size});
  memory.norm = take.vector(from.norm_weight, {s.memory_value_size});
  memory.mix = take.vector(block.mix_memory, {s.width});
  if (!gated) return memory;
  memory.decay = take.matrix(from.decay, heads, s.width);
  memory.a_log = take.vector(from.a_log, {heads});
  memory.dt_bias = take.vector(from.dt_bias, {heads});
  return memory;
}

cpu::DecodingLayer layer_of(const nn::BlockImpl& block, const LanguageModelConfig& config,
                            const cpu::DecodingSizes& sizes, Taker& take) {
  const auto width = sizes.width;
  const auto hidden = sizes.feed_forward_width;
  cpu::DecodingLayer layer;
  layer.mixer_norm = take.vector(block.mixer_norm->weight, {width});
  layer.feed_forward_norm = take.vector(block.feed_forward_norm->weight, {width});
  if (!block.attention.is_empty()) {
    layer.attention = attention_of(block, sizes, take);
  }
  if (!block.memory.is_empty()) {
    const bool gated = config.memory_rule == "gated_delta_rule";
    layer.memory = memory_of(block, sizes, gated, take);
  }
  layer.gate = take.matrix(block.feed_forward->gate, hidden, width);
  layer.up = take.matrix(block.feed_forward->up, hidden, width);
  layer.down = take.matrix(block.feed_forward->down, width, hidden);
  return layer;
}

/// Calls `visit(tensor)` for every tensor that a decoder is made from; some may be undefined.
template <class Visit>
void for_each_tensor(const nn::LanguageModelImpl& model, Visit visit) {
  const auto linear = [&](const torch::nn::Linear& layer) {
    if (layer.is_empty()) return;
    visit(layer->weight);
    visit(layer->bias);
  };
  visit(model.embedding->weight);
  visit(model.norm->weight);
  linear(model.output);
  for (const auto& block : model.blocks) {
    visit(block->mixer_norm->weight);
    visit(block->feed_forward_norm->weight);
    if (!block->attention.is_empty()) {
      const auto& a = *block->attention;
      for (const auto* layer : {&a.query, &a.key, &a.value, &a.output}) linear(*layer);
      for (const auto* each : {&a.sink_key, &a.sink_value, &block->mix_attention}) visit(*each);
    }
    if (!block->memory.is_empty()) {
      const auto& m = *block->memory;
      for (const auto* layer : {&m.query, &m.key, &m.value, &m.beta, &m.decay, &m.gate, &m.output})
        linear(*layer);
      for (const auto* each :
           {&m.convolution_weight, &m.norm_weight, &m.a_log, &m.dt_bias, &block->mix_memory})
        visit(*each);
    }
    const auto& f = *block->feed_forward;
    for (const auto* layer : {&f.gate, &f.up, &f.down}) linear(*layer);
  }
}

/// What a tensor was when a decoder was made.
struct Seen {
  at::Tensor tensor;
  const void* data = nullptr;
  std::uint32_t version = 0;

  explicit Seen(const at::Tensor& now)
      : tensor(now), data(data_of(now)), version(version_of(now)) {}

  bool is(const at::Tensor& now) const {
    return tensor.is_same(now) && data == data_of(now) && version == version_of(now);
  }

 private:
  static const void* data_of(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr() : nullptr;
  }
  static std::uint32_t version_of(const at::Tensor& tensor) {
    return tensor.defined() && !tensor.is_inference() ? tensor._version() : 0;
  }
};

/// What a model's slot keeps: its decoder, or the knowledge that there is none.
struct Kept {
  std::vector<Seen> seen;
  std::shared_ptr<const Decoder> decoder;

  bool fits(const nn::LanguageModelImpl& model) const {
    std::size_t next = 0;
    bool same = true;
    for_each_tensor(model, [&](const at::Tensor& tensor) {
      same = same && next < seen.size() && seen[next].is(tensor);
      ++next;
    });
    return same && next == seen.size();
  }
};

/// The layers without the branches that are switched off.
cpu::DecodingModel with_switches(cpu::DecodingModel plan, const nn::LanguageModelImpl& model) {
  for (std::size_t layer = 0; layer < plan.layers.size(); ++layer) {
    if (!model.blocks[layer]->attention_enabled) plan.layers[layer].attention = {};
    if (!model.blocks[layer]->memory_enabled) plan.layers[layer].memory = {};
  }
  return plan;
}

bool all_on(const nn::LanguageModelImpl& model) {
  return std::ranges::all_of(model.blocks, [](const nn::Block& block) {
    return block->attention_enabled && block->memory_enabled;
  });
}

/// The plan, or, where branches are switched off, one without them, which `cut` gets.
const cpu::DecodingModel& switched(const cpu::DecodingModel& plan,
                                   const nn::LanguageModelImpl& model,
                                   std::optional<cpu::DecodingModel>& cut) {
  return all_on(model) ? plan : cut.emplace(with_switches(plan, model));
}

cpu::DecodingHeadState head_of(const nn::HeadState& head) {
  if (!head.state.defined()) return {};
  return {head.state.mutable_data_ptr<float>(), head.hidden.mutable_data_ptr(),
          head.logits.mutable_data_ptr<float>()};
}

std::int64_t& position_of(const nn::LanguageModelState& state) {
  return *state.position.mutable_data_ptr<std::int64_t>();
}

cpu::DecodingState state_of(const nn::BlockState& block) {
  const auto data = [](const at::Tensor& tensor) -> void* {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
  };
  return {static_cast<float*>(data(block.memory.state)), data(block.memory.conv),
          data(block.attention.key), data(block.attention.value)};
}

}  // namespace

std::shared_ptr<const Decoder> Decoder::of(const nn::LanguageModelImpl& model) {
  return model.derived().with([&](std::shared_ptr<const void>& slot) {
    const auto* kept = static_cast<const Kept*>(slot.get());
    if (kept != nullptr && kept->fits(model)) return kept->decoder;
    auto made = std::make_shared<Kept>();
    for_each_tensor(model, [&](const at::Tensor& tensor) { made->seen.emplace_back(tensor); });
    made->decoder = make(model);
    slot = made;
    return made->decoder;
  });
}

std::unique_ptr<Decoder> Decoder::make(const nn::LanguageModelImpl& model) {
  const at::NoGradGuard no_gradient;
  const auto& config = model.config();
  const auto type = model.norm->weight.scalar_type();
  if (type != at::kFloat && type != at::kBFloat16) return nullptr;
  Taker take(type);
  std::unique_ptr<Decoder> decoder(new Decoder());
  auto& plan = decoder->model_;
  plan.dtype = dtype_of(model.norm->weight);
  plan.sizes = sizes_of(config);
  plan.embedding = take.matrix(model.embedding->weight, config.vocabulary_size, config.width);
  for (const auto& block : model.blocks) {
    plan.layers.push_back(layer_of(*block, config, plan.sizes, take));
  }
  plan.norm = take.vector(model.norm->weight, {config.width});
  plan.output = model.output.is_empty()
                    ? plan.embedding
                    : take.matrix(model.output, config.vocabulary_size, config.width);
  plan.fast_head = config.fast_head;
  plan.head_eta = config.fast_head_eta;
  plan.head_decay = config.fast_head_decay();
  if (!take.fits()) return nullptr;
  decoder->kept_ = std::move(take).kept();
  return decoder;
}

namespace {

std::vector<cpu::DecodingState> states_of(const nn::LanguageModelState& state) {
  std::vector<cpu::DecodingState> states;
  states.reserve(state.blocks.size());
  for (const auto& block : state.blocks) states.push_back(state_of(block));
  return states;
}

/// Calls `visit(row)` with the rows of the rings in which `count` tokens from `position` on
/// stand or are going to stand.
template <class Visit>
void for_each_row(const nn::LanguageModelState& state, std::int64_t position, std::int64_t count,
                  Visit visit) {
  for (const auto& block : state.blocks) {
    for (const at::Tensor* ring : {&block.attention.key, &block.attention.value}) {
      if (!ring->defined()) continue;
      const std::int64_t window = ring->size(1);
      const auto bytes = ring->nbytes() / static_cast<std::size_t>(window);
      auto* first = static_cast<std::byte*>(ring->mutable_data_ptr());
      for (std::int64_t i = 0; i < count; ++i) {
        const auto slot = static_cast<std::size_t>((position + i) % window);
        visit(std::span(first + slot * bytes, bytes));
      }
    }
  }
}

void save_rows(const nn::LanguageModelState& state, std::int64_t count,
               std::vector<std::byte>& rows) {
  rows.clear();
  for_each_row(state, position_of(state), count, [&](std::span<const std::byte> row) {
    rows.insert(rows.end(), row.begin(), row.end());
  });
}

void restore_rows(const ReadAhead& ahead, const nn::LanguageModelState& state) {
  const auto* next = ahead.rows.data();
  for_each_row(state, position_of(state), std::ssize(ahead.tokens), [&](std::span<std::byte> row) {
    std::copy_n(next, row.size(), row.data());
    next += row.size();
  });
}

void copy_to(const at::Tensor& from, at::Tensor& to) {
  if (!from.defined()) return;
  if (to.defined() && to.sizes() == from.sizes() && to.dtype() == from.dtype()) {
    to.copy_(from);
  } else {
    to = from.clone();
  }
}

/// Copies all but the rings, which both states have then.
void copy_state(const nn::LanguageModelState& from, nn::LanguageModelState& to) {
  to.blocks.resize(from.blocks.size());
  for (std::size_t i = 0; i < from.blocks.size(); ++i) {
    copy_to(from.blocks[i].memory.state, to.blocks[i].memory.state);
    copy_to(from.blocks[i].memory.conv, to.blocks[i].memory.conv);
    to.blocks[i].attention = from.blocks[i].attention;
  }
  copy_to(from.position, to.position);
  copy_to(from.head.state, to.head.state);
  copy_to(from.head.hidden, to.head.hidden);
  copy_to(from.head.logits, to.head.logits);
}

/// Fills all but the results.
void prepare(const DecoderAhead& from, const cpu::DecodingModel& plan) {
  ReadAhead& ahead = *from.out;
  const auto tokens = std::ssize(from.tokens);
  const std::int64_t trace = cpu::decoding_trace(plan);
  ahead.tokens.assign(from.tokens.begin(), from.tokens.end());
  ahead.strength = from.strength;
  copy_state(*from.state, ahead.state);
  save_rows(*from.state, tokens, ahead.rows);
  const bool fits =
      ahead.traces.defined() && ahead.traces.size(0) >= tokens && ahead.traces.size(1) == trace;
  if (!fits) ahead.traces = at::empty({tokens, trace}, at::kFloat);
  ahead.hidden = from.hidden ? at::empty({tokens, plan.sizes.width}, at::kFloat) : at::Tensor();
}

float* row_of(const at::Tensor& rows, std::int64_t i) {
  return rows.defined() ? rows.mutable_data_ptr<float>() + i * rows.size(1) : nullptr;
}

/// Tokens of a decoder's pass, with what they point at.
class Pass {
 public:
  Pass(std::size_t sessions, std::size_t tokens) {
    states_.reserve(sessions);
    tokens_.reserve(tokens);
  }

  void add(const DecoderStep& step, std::int64_t width) {
    const auto row = [&](at::Tensor* out) -> float* {
      if (out == nullptr) return nullptr;
      *out = at::empty({width}, at::kFloat);
      return out->mutable_data_ptr<float>();
    };
    const auto* states = states_.emplace_back(states_of(*step.state)).data();
    tokens_.push_back({.token = step.token,
                       .position = position_of(*step.state)++,
                       .strength = step.strength,
                       .states = states,
                       .head = head_of(step.state->head),
                       .hidden = row(step.hidden),
                       .feed_forward_delta =
                           step.delta != nullptr ? step.delta->const_data_ptr<float>() : nullptr,
                       .mixed = row(step.mixed)});
  }

  void add(const ReadAhead& ahead, std::int64_t count, const nn::LanguageModelState& state) {
    const auto* states = states_.emplace_back(states_of(state)).data();
    for (std::int64_t i = 0; i < count; ++i) {
      tokens_.push_back({ahead.tokens[static_cast<std::size_t>(i)], position_of(state)++,
                         ahead.strength, states, head_of(state.head), row_of(ahead.hidden, i),
                         row_of(ahead.traces, i)});
    }
  }

  std::span<const cpu::DecodingToken> tokens() const { return tokens_; }

 private:
  std::vector<std::vector<cpu::DecodingState>> states_;
  std::vector<cpu::DecodingToken> tokens_;
};

}  // namespace

void Decoder::step(const nn::LanguageModelImpl& model, std::span<const DecoderStep> steps,
                   std::span<const DecoderAhead> ahead) const {
  std::optional<cpu::DecodingModel> cut;
  const cpu::DecodingModel& plan = switched(model_, model, cut);
  std::size_t count = steps.size();
  for (const DecoderAhead& each : ahead) count += each.tokens.size();
  Pass pass(steps.size() + ahead.size(), count);
  for (const DecoderStep& step : steps) pass.add(step, plan.sizes.width);
  for (const DecoderAhead& each : ahead) {
    prepare(each, plan);
    pass.add(*each.out, std::ssize(each.tokens), each.out->state);
  }
  const auto all = static_cast<std::int64_t>(count);
  core::AlignedBuffer<float> scratch(static_cast<std::size_t>(cpu::decoding_scratch(plan, all)));
  at::Tensor logits = at::empty({all, plan.output.rows}, at::kFloat);
  cpu::decode_tokens(plan, pass.tokens(), scratch.data(), logits.mutable_data_ptr<float>(),
                     parallel_executor());
  std::int64_t row = 0;
  for (const DecoderStep& step : steps) {
    // Of its own: a session does not keep the logits of others.
    *step.logits = all == 1 ? logits[0] : logits[row].clone();
    ++row;
  }
  for (const DecoderAhead& each : ahead) {
    const auto tokens = std::ssize(each.tokens);
    each.out->logits = logits.slice(0, row, row + tokens).clone();
    row += tokens;
  }
}

void Decoder::keep(const nn::LanguageModelImpl& model, const ReadAhead& ahead, std::int64_t count,
                   nn::LanguageModelState& state) const {
  std::optional<cpu::DecodingModel> cut;
  const cpu::DecodingModel& plan = switched(model_, model, cut);
  restore_rows(ahead, state);
  Pass pass(1, static_cast<std::size_t>(count));
  pass.add(ahead, count, state);
  cpu::keep_tokens(plan, pass.tokens(), parallel_executor());
}

std::int64_t Decoder::most_ahead() const {
  const auto heads = model_.sizes.attention_heads;
  return heads > 0 ? model_.sizes.attention_window : std::numeric_limits<std::int64_t>::max();
}

}  // namespace fastweights::detail
