#include "fastweights/nn/state.hpp"

#include <ATen/ATen.h>

#include <charconv>
#include <optional>
#include <string_view>

#include "fastweights/core/error.hpp"

namespace fastweights::nn {
namespace {

// Calls `visit(tensor)` for every tensor of the state, defined or not.
template <class State, class Visit>
void for_each_tensor(State& state, Visit&& visit) {
  for (auto& block : state.blocks) {
    visit(block.memory.state);
    visit(block.memory.conv);
    visit(block.attention.key);
    visit(block.attention.value);
  }
  visit(state.head.state);
  visit(state.head.hidden);
  visit(state.head.logits);
  visit(state.position);
}

template <class Map>
LanguageModelState mapped(LanguageModelState state, Map&& map) {
  for_each_tensor(state, [&](at::Tensor& tensor) {
    if (tensor.defined()) tensor = map(tensor);
  });
  return state;
}

struct LayerName {
  std::size_t layer;
  std::string_view field;
};

// Splits "layers.N.field"; no value for any other name.
std::optional<LayerName> parse_layer_name(std::string_view name) {
  constexpr std::string_view kPrefix = "layers.";
  constexpr std::size_t kMaxLayers = 1024;
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const std::string_view rest = name.substr(kPrefix.size());
  std::size_t layer = 0;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), layer);
  const auto digits = static_cast<std::size_t>(end - rest.data());
  if (error != std::errc() || layer >= kMaxLayers) return std::nullopt;
  if (digits == rest.size() || rest[digits] != '.') return std::nullopt;
  return LayerName{layer, rest.substr(digits + 1)};
}

at::Tensor* field_of(BlockState& block, std::string_view field) {
  if (field == "memory.state") return &block.memory.state;
  if (field == "memory.conv") return &block.memory.conv;
  if (field == "attention.key") return &block.attention.key;
  if (field == "attention.value") return &block.attention.value;
  return nullptr;
}

at::Tensor* find_field(LanguageModelState& state, std::string_view name) {
  if (name == "position") return &state.position;
  if (name == "head.state") return &state.head.state;
  if (name == "head.hidden") return &state.head.hidden;
  if (name == "head.logits") return &state.head.logits;
  const auto parsed = parse_layer_name(name);
  if (!parsed) return nullptr;
  if (parsed->layer >= state.blocks.size()) state.blocks.resize(parsed->layer + 1);
  return field_of(state.blocks[parsed->layer], parsed->field);
}

}  // namespace

LanguageModelState LanguageModelState::detach() const {
  return mapped(*this, [](const at::Tensor& tensor) { return tensor.detach(); });
}

LanguageModelState LanguageModelState::clone() const {
  return mapped(*this, [](const at::Tensor& tensor) { return tensor.clone(); });
}

LanguageModelState LanguageModelState::to(at::Device device) const {
  return mapped(*this, [&](const at::Tensor& tensor) { return tensor.to(device); });
}

LanguageModelState LanguageModelState::reset_rows(const at::Tensor& mask) const {
  if (mask.dim() != 1 || mask.size(0) != batch() || mask.scalar_type() != at::kBool) {
    throw ShapeError("reset_rows: mask must be bool [B] = [" + std::to_string(batch()) + "]");
  }
  return mapped(*this, [&](const at::Tensor& tensor) {
    std::vector<int64_t> shape(static_cast<std::size_t>(tensor.dim()), 1);
    shape[0] = tensor.size(0);
    return tensor.masked_fill(mask.to(tensor.device()).view(shape), 0);
  });
}

int64_t LanguageModelState::batch() const { return position.defined() ? position.size(0) : 0; }

int64_t LanguageModelState::bytes() const {
  int64_t total = 0;
  for_each_tensor(*this, [&](const at::Tensor& tensor) {
    if (tensor.defined()) total += static_cast<int64_t>(tensor.nbytes());
  });
  return total;
}

NamedTensors LanguageModelState::tensors() const {
  NamedTensors named;
  const auto add = [&](std::string name, const at::Tensor& tensor) {
    if (tensor.defined()) named.emplace_back(std::move(name), tensor);
  };
  for (std::size_t n = 0; n < blocks.size(); ++n) {
    const std::string layer = "layers." + std::to_string(n) + ".";
    add(layer + "memory.state", blocks[n].memory.state);
    add(layer + "memory.conv", blocks[n].memory.conv);
    add(layer + "attention.key", blocks[n].attention.key);
    add(layer + "attention.value", blocks[n].attention.value);
  }
  add("head.state", head.state);
  add("head.hidden", head.hidden);
  add("head.logits", head.logits);
  add("position", position);
  return named;
}

LanguageModelState LanguageModelState::from_tensors(const NamedTensors& tensors) {
  LanguageModelState state;
  for (const auto& [name, tensor] : tensors) {
    at::Tensor* field = find_field(state, name);
    if (field == nullptr) throw StateMismatch("state: unknown tensor \"" + name + "\"");
    if (field->defined()) throw StateMismatch("state: tensor \"" + name + "\" appears twice");
    *field = tensor;
  }
  if (!state.position.defined()) throw StateMismatch("state: tensor \"position\" is missing");
  return state;
}

}  // namespace fastweights::nn
