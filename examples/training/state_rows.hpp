#pragma once

#include <cstdint>
#include <vector>

#include "fastweights/nn/state.hpp"

namespace training {

/// One state for the rows of all `states`, in order.
fastweights::nn::LanguageModelState join_rows(
    const std::vector<fastweights::nn::LanguageModelState>& states);

/// The rows of `state` in `count` parts (see `part` in workers.hpp).
std::vector<fastweights::nn::LanguageModelState> split_rows(
    const fastweights::nn::LanguageModelState& state, int64_t count);

}  // namespace training
