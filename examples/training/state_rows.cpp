#include "state_rows.hpp"

#include <ATen/ATen.h>

#include "workers.hpp"

namespace training {

using fastweights::nn::LanguageModelState;
using fastweights::nn::NamedTensors;

LanguageModelState join_rows(const std::vector<LanguageModelState>& states) {
  std::vector<NamedTensors> all;
  for (const LanguageModelState& state : states) all.push_back(state.tensors());
  NamedTensors joined;
  for (size_t i = 0; i < all[0].size(); ++i) {
    std::vector<at::Tensor> rows;
    for (const NamedTensors& tensors : all) rows.push_back(tensors[i].second);
    joined.emplace_back(all[0][i].first, at::cat(rows));
  }
  return LanguageModelState::from_tensors(joined);
}

std::vector<LanguageModelState> split_rows(const LanguageModelState& state, int64_t count) {
  const NamedTensors tensors = state.tensors();
  std::vector<LanguageModelState> states;
  for (int64_t index = 0; index < count; ++index) {
    const auto [begin, end] = part(state.batch(), count, index);
    NamedTensors rows;
    for (const auto& [name, tensor] : tensors) {
      rows.emplace_back(name, tensor.slice(0, begin, end).contiguous());
    }
    states.push_back(LanguageModelState::from_tensors(rows));
  }
  return states;
}

}  // namespace training
