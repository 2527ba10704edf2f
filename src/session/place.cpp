#include "place.hpp"

#include <ATen/ATen.h>

#include <string>

namespace fastweights::detail {
namespace {

/// Calls `visit(name, tensor)` for each tensor that a place keeps beside the model's state.
template <class AnyPlace, class Visit>
void for_each_beside(AnyPlace& place, Visit visit) {
  visit("logits", place.logits);
  if (place.end_to_end.delta.defined()) {
    visit("end_to_end.delta", place.end_to_end.delta);
    visit("end_to_end.waiting", place.end_to_end.waiting);
    visit("end_to_end.tokens", place.end_to_end.tokens);
    visit("end_to_end.strengths", place.end_to_end.strengths);
  }
  for (std::size_t layer = 0; layer < place.covariances.size(); ++layer) {
    visit("layers." + std::to_string(layer) + ".memory.covariance", place.covariances[layer]);
  }
}

}  // namespace

nn::NamedTensors tensors_of(const Place& place) {
  nn::NamedTensors tensors = place.state.tensors();
  for_each_beside(place, [&](const std::string& name, const at::Tensor& tensor) {
    tensors.emplace_back(name, tensor);
  });
  return tensors;
}

Place with_tensors(Place place, const nn::NamedTensors& tensors) {
  const auto end = tensors.begin() + std::ssize(place.state.tensors());
  place.state = nn::LanguageModelState::from_tensors({tensors.begin(), end});
  auto next = end;
  for_each_beside(place,
                  [&](const std::string&, at::Tensor& tensor) { tensor = (next++)->second; });
  return place;
}

std::int64_t tensor_bytes(const Place& place) {
  std::int64_t bytes = 0;
  for (const auto& [name, tensor] : tensors_of(place)) {
    bytes += static_cast<std::int64_t>(tensor.nbytes());
  }
  return bytes;
}

}  // namespace fastweights::detail
