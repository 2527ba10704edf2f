#include "recollection.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "../ops/layer_op.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/nn/language_model.hpp"

namespace fastweights::detail {
namespace {

constexpr const char* kHidden = "store.hidden";
constexpr const char* kLogits = "store.logits";

at::Tensor on_host(const at::Tensor& tensor) {
  return tensor.to(at::TensorOptions(at::kFloat).device(at::kCPU)).contiguous();
}

std::span<const float> span_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
}

StoredTensor stored(const char* name, const at::Tensor& tensor) {
  StoredTensor out{name, io::ScalarType::F32, tensor.sizes().vec(), {}};
  out.bytes.resize(tensor.nbytes());
  std::memcpy(out.bytes.data(), tensor.const_data_ptr(), tensor.nbytes());
  return out;
}

at::Tensor taken(std::span<const io::TensorData> tensors, const char* name, std::int64_t size) {
  const auto found = std::ranges::find(tensors, name, &io::TensorData::name);
  if (found == tensors.end() || found->type != io::ScalarType::F32 ||
      found->shape != std::vector{size}) {
    throw FileError(std::string("exact store: tensor ") + name + " must be there as F32 [" +
                    std::to_string(size) + "]");
  }
  at::Tensor tensor = at::empty({size}, at::kFloat);
  std::memcpy(tensor.data_ptr(), found->bytes.data(), found->bytes.size());
  return tensor;
}

/// Rows shifted by one: the row of a place is that after the token before it.
at::Tensor before_each(const at::Tensor& first, const at::Tensor& after) {
  return at::cat({first.unsqueeze(0), after.slice(0, 0, after.size(0) - 1)});
}

}  // namespace

Recollection::Recollection(const ExactStoreOptions& options, const nn::LanguageModelImpl& model)
    : store_(model.config().width, model.config().vocabulary_size, options),
      hidden_(at::zeros({model.config().width}, at::kFloat)),
      logits_(at::zeros({model.config().vocabulary_size}, at::kFloat)) {}

void Recollection::move_to(at::Tensor hidden, at::Tensor logits) {
  hidden_ = std::move(hidden);
  logits_ = std::move(logits);
  recall_ = store_.recall(span_of(hidden_), parallel_executor());
}

void Recollection::mix_into(float* out) const {
  const auto logits = span_of(logits_);
  store_.mix(recall_, logits, {out, logits.size()});
}

at::Tensor Recollection::read(std::span<const std::int64_t> tokens, const at::Tensor& hidden,
                              const at::Tensor& logits, std::span<const float> strengths) {
  const at::Tensor hidden_after = on_host(hidden);
  const at::Tensor logits_after = on_host(logits);
  const at::Tensor hidden_before = before_each(hidden_, hidden_after);
  const at::Tensor logits_before = before_each(logits_, logits_after);
  const auto count = std::ssize(tokens);
  at::Tensor rows = at::empty({count + 1, logits_after.size(1)}, at::kFloat);
  const std::span<float> out(rows.mutable_data_ptr<float>(),
                             static_cast<std::size_t>(logits_before.numel()));
  store_.read({tokens, span_of(hidden_before), span_of(logits_before), strengths}, out,
              parallel_executor());
  move_to(hidden_after[-1].clone(), logits_after[-1].clone());
  mix_into(out.data() + out.size());
  return rows.slice(0, 1);
}

at::Tensor Recollection::write(std::int64_t token, const at::Tensor& hidden,
                               const at::Tensor& logits, float strength) {
  store_.append(token, recall_, span_of(logits_), strength);
  move_to(on_host(hidden), on_host(logits));
  at::Tensor out = at::empty_like(logits_);
  mix_into(out.mutable_data_ptr<float>());
  return out;
}

std::vector<StoredTensor> Recollection::tensors() const {
  std::vector<StoredTensor> out = store_.tensors();
  out.push_back(stored(kHidden, hidden_));
  out.push_back(stored(kLogits, logits_));
  return out;
}

std::vector<StoredTensor> Recollection::place_tensors() const {
  std::vector<StoredTensor> out = ExactStore::tensors(store_.checkpoint());
  out.push_back(stored(kHidden, hidden_));
  out.push_back(stored(kLogits, logits_));
  return out;
}

Recollection Recollection::from_tensors(const ExactStore& content,
                                        const nn::LanguageModelImpl& model,
                                        std::span<const io::TensorData> tensors) {
  ExactStore store = content;
  store.rollback(content.checkpoint_from_tensors(tensors));
  Recollection recollection(std::move(store));
  recollection.move_to(taken(tensors, kHidden, model.config().width),
                       taken(tensors, kLogits, model.config().vocabulary_size));
  return recollection;
}

at::ScalarType torch_type(io::ScalarType type) {
  switch (type) {
    case io::ScalarType::F64: return at::kDouble;
    case io::ScalarType::F32: return at::kFloat;
    case io::ScalarType::I64: return at::kLong;
    case io::ScalarType::I8: return at::kChar;
    default: return at::kByte;
  }
}

nn::NamedTensors to_named_tensors(std::span<const StoredTensor> stored) {
  nn::NamedTensors named;
  for (const StoredTensor& each : stored) {
    at::Tensor tensor = at::empty(each.shape, torch_type(each.type));
    if (!each.bytes.empty()) {
      std::memcpy(tensor.mutable_data_ptr(), each.bytes.data(), each.bytes.size());
    }
    named.emplace_back(each.name, std::move(tensor));
  }
  return named;
}

std::vector<io::TensorData> with_prefix(const std::string& prefix,
                                        std::span<const io::TensorData> tensors) {
  std::vector<io::TensorData> out;
  for (const auto& tensor : tensors) {
    if (!tensor.name.starts_with(prefix)) continue;
    out.push_back(tensor);
    out.back().name = tensor.name.substr(prefix.size());
  }
  return out;
}

}  // namespace fastweights::detail
