#include "fastweights/nn/language_model.hpp"

#include <ATen/ATen.h>
#include <torch/nn/modules/container/modulelist.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <sstream>

#include "dropout.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/ops/fast_head.hpp"
#include "projection.hpp"

namespace fastweights::nn {
namespace {

void check_tokens(const at::Tensor& tokens) {
  if (tokens.defined() && tokens.dim() == 2 && tokens.scalar_type() == at::kLong) return;
  std::ostringstream message;
  message << "language_model: tokens must be int64 [B, T], got ";
  if (tokens.defined()) {
    message << tokens.scalar_type() << ' ' << tokens.sizes();
  } else {
    message << "an undefined tensor";
  }
  throw ShapeError(message.str());
}

std::string describe(const at::Tensor& tensor) {
  std::ostringstream out;
  if (tensor.defined()) {
    out << tensor.scalar_type() << ' ' << tensor.sizes();
  } else {
    out << "none";
  }
  return out.str();
}

void check_tensor(const std::string& name, const at::Tensor& given, at::IntArrayRef shape,
                  bool wanted) {
  if (!wanted && !given.defined()) return;
  if (wanted && given.defined() && given.sizes() == shape) return;
  std::ostringstream expected;
  if (wanted) {
    expected << shape;
  } else {
    expected << "none";
  }
  throw StateMismatch("language_model: state tensor " + name + " must be " + expected.str() +
                      ", got " + describe(given));
}

void check_state(const LanguageModelConfig& config, int64_t batch,
                 const LanguageModelState& state) {
  check_tensor("position", state.position, {batch}, true);
  if (state.position.scalar_type() != at::kLong) {
    throw StateMismatch("language_model: state tensor position must be int64, got " +
                        describe(state.position));
  }
  if (static_cast<int64_t>(state.blocks.size()) != config.layers) {
    throw StateMismatch("language_model: the state has " + std::to_string(state.blocks.size()) +
                        " layers, the model " + std::to_string(config.layers));
  }
  const auto values = config.memory_value_heads * config.memory_value_size;
  const auto channels = 2 * config.memory_heads * config.memory_key_size + values;
  const auto size = config.width / std::max<int64_t>(config.attention_heads, 1);
  for (int64_t n = 0; n < config.layers; ++n) {
    const auto& block = state.blocks[static_cast<std::size_t>(n)];
    const auto layer = "layers." + std::to_string(n) + ".";
    check_tensor(
        layer + "memory.state", block.memory.state,
        {batch, config.memory_value_heads, config.memory_key_size, config.memory_value_size},
        config.memory);
    check_tensor(layer + "memory.conv", block.memory.conv,
                 {batch, config.convolution_size - 1, channels}, config.memory);
    for (const auto* field : {"key", "value"}) {
      check_tensor(layer + "attention." + field,
                   field[0] == 'k' ? block.attention.key : block.attention.value,
                   {batch, config.attention_window, config.attention_heads, size},
                   config.attention);
    }
  }
}

void check_write_strength(const at::Tensor& tokens, const at::Tensor& strength) {
  if (!strength.defined()) return;
  if (strength.sizes() == tokens.sizes() && strength.scalar_type() == at::kFloat) return;
  std::ostringstream message;
  message << "language_model: write_strength must be Float [B, T] = " << tokens.sizes() << ", got "
          << describe(strength);
  throw ShapeError(message.str());
}

void check_head(const LanguageModelConfig& config, int64_t batch, const HeadState& head) {
  const auto check = [&](const char* field, const at::Tensor& given, at::IntArrayRef shape) {
    check_tensor(std::string("head.") + field, given, shape, config.fast_head);
  };
  check("state", head.state, {batch, config.width, config.vocabulary_size});
  check("hidden", head.hidden, {batch, config.width});
  check("logits", head.logits, {batch, config.vocabulary_size});
}

LanguageModelConfig validated(LanguageModelConfig config) {
  config.validate();
  return config;
}

}  // namespace

LanguageModelImpl::LanguageModelImpl(LanguageModelConfig config)
    : config_(validated(std::move(config))) {
  reset();
}

void LanguageModelImpl::reset() {
  embedding =
      register_module("embedding", torch::nn::Embedding(config_.vocabulary_size, config_.width));
  {
    const at::NoGradGuard no_grad;
    embedding->weight.normal_(0.0, config_.initializer_range);
  }
  auto list = register_module("blocks", torch::nn::ModuleList());
  for (int64_t layer = 0; layer < config_.layers; ++layer) list->push_back(Block(config_, layer));
  collect_blocks();
  norm = register_module("norm", RMSNorm(config_.width, config_.norm_epsilon));
  if (config_.fast_head && config_.fast_head_initial_matrix) {
    head_initial_matrix = register_parameter("head_initial_matrix",
                                             at::zeros({config_.width, config_.vocabulary_size}));
  }
  if (config_.tie_embeddings) return;
  output = register_module(
      "output", make_projection(config_.width, config_.vocabulary_size, config_.initializer_range));
}

// Cloning replaces the list's modules.
std::shared_ptr<torch::nn::Module> LanguageModelImpl::clone(
    const std::optional<at::Device>& device) const {
  auto copy = Cloneable::clone(device);
  std::static_pointer_cast<LanguageModelImpl>(copy)->collect_blocks();
  return copy;
}

void LanguageModelImpl::collect_blocks() {
  blocks.clear();
  for (const auto& child : named_children()["blocks"]->children()) {
    blocks.emplace_back(std::dynamic_pointer_cast<BlockImpl>(child));
  }
}

LanguageModelState LanguageModelImpl::initial_state(int64_t batch) const {
  LanguageModelState state;
  for (const auto& block : blocks) state.blocks.push_back(block->initial_state(batch));
  state.position = at::zeros({batch}, at::TensorOptions(at::kLong).device(norm->weight.device()));
  if (!config_.fast_head) return state;
  const auto narrow = norm->weight.options().requires_grad(false);
  const auto wide = narrow.dtype(narrow.dtype() == at::kDouble ? at::kDouble : at::kFloat);
  auto matrix = head_initial_matrix.defined()
                    ? head_initial_matrix.to(wide).repeat({batch, 1, 1})
                    : at::zeros({batch, config_.width, config_.vocabulary_size}, wide);
  state.head = {std::move(matrix), at::zeros({batch, config_.width}, narrow),
                at::zeros({batch, config_.vocabulary_size}, wide)};
  return state;
}

at::Tensor LanguageModelImpl::draw_memory_keep(int64_t batch) const {
  if (!is_training() || config_.memory_dropout == 0.0) return {};
  return at::bernoulli(at::full({batch, 1, 1}, 1.0 - config_.memory_dropout,
                                norm->weight.options().requires_grad(false)));
}

at::Tensor LanguageModelImpl::to_logits(const at::Tensor& normed) const {
  const auto logits =
      output.is_empty() ? at::linear(normed, embedding->weight) : project(output, normed);
  return logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
}

at::Tensor LanguageModelImpl::correct(const at::Tensor& normed, const at::Tensor& logits,
                                      const at::Tensor& tokens, const HeadState& before,
                                      const ForwardOptions& options, HeadState& next) const {
  const FastHeadParams params{config_.fast_head_eta, config_.fast_head_decay(), options.in_place,
                              options.write_strength, options.limited_writes};
  auto [corrected, state, hidden, last] = fastweights::fast_head(
      normed, logits, tokens, before.state, before.hidden, before.logits, params);
  next = {std::move(state), std::move(hidden), std::move(last)};
  return corrected;
}

LanguageModelOutput LanguageModelImpl::forward(const at::Tensor& tokens,
                                               const LanguageModelState& state,
                                               const ForwardOptions& options) const {
  check_tokens(tokens);
  check_state(config_, tokens.size(0), state);
  check_head(config_, tokens.size(0), state.head);
  if (options.memory_keep.defined() &&
      options.memory_keep.sizes() != at::IntArrayRef({tokens.size(0), 1, 1})) {
    throw ShapeError(
        fmt::format("language_model: memory_keep must be [B, 1, 1] = [{}, 1, 1], got [{}]",
                    tokens.size(0), fmt::join(options.memory_keep.sizes(), ", ")));
  }
  check_write_strength(tokens, options.write_strength);
  BlockImpl::Options block_options{
      options.in_place,
      options.memory_keep.defined() ? options.memory_keep : draw_memory_keep(tokens.size(0)),
      {options.write_strength, options.limited_writes},
      {},
      options.generator};
  auto x = drop_elements(embedding.ptr()->forward(tokens), is_training() ? config_.dropout : 0.0,
                         options.generator);
  LanguageModelState next;
  next.blocks.reserve(blocks.size());
  for (std::size_t n = 0; n < blocks.size(); ++n) {
    if (options.memory_rule) {
      block_options.rule = [&options, n](const MemoryRuleCall& call) {
        return options.memory_rule(static_cast<int64_t>(n), call);
      };
    }
    if (n + 1 == blocks.size() && options.last_feed_forward) {
      block_options.feed_forward = &options.last_feed_forward;
    }
    auto result = blocks[n]->forward(x, state.blocks[n], state.position, block_options);
    x = std::move(result.x);
    next.blocks.push_back(std::move(result.state));
  }
  next.position =
      options.in_place ? state.position.add_(tokens.size(1)) : state.position + tokens.size(1);
  const auto last = [&](const at::Tensor& rows) {
    const auto count = rows.size(1);
    return options.last_logits_only && count > 1 ? rows.narrow(1, count - 1, 1) : rows;
  };
  if (config_.fast_head || options.hidden != nullptr) x = norm->forward(x);
  if (options.hidden != nullptr) *options.hidden = x;
  if (config_.fast_head) {  // it learns from the logits of every token
    const auto logits = correct(x, to_logits(x), tokens, state.head, options, next.head);
    return {options.logits ? last(logits) : at::Tensor(), std::move(next)};
  }
  if (!options.logits) return {{}, std::move(next)};
  const auto rows = last(x);
  return {to_logits(options.hidden != nullptr ? rows : norm->forward(rows)), std::move(next)};
}

void LanguageModelImpl::enable_attention(bool enabled) {
  for (auto& block : blocks) block->attention_enabled = enabled;
}

void LanguageModelImpl::enable_memory(bool enabled) {
  for (auto& block : blocks) block->memory_enabled = enabled;
}

int64_t LanguageModelImpl::parameter_count() const {
  int64_t count = 0;
  for (const auto& parameter : parameters()) count += parameter.numel();
  return count;
}

int64_t LanguageModelImpl::state_bytes(int64_t batch) const {
  return initial_state(1).bytes() * batch;
}

}  // namespace fastweights::nn
