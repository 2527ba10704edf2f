#pragma once

#include <cstdint>

#include "fastweights/nn/state.hpp"
#include "fastweights/session/session.hpp"

/// \file
/// All tensors of a place at once: for checkpoints, files and counts of bytes.

namespace fastweights::detail {

/// Names and tensors in a fixed order: the model's state, `logits`, `end_to_end.…`,
/// `layers.N.memory.covariance`, as far as there are such. Those of an exact store are not among
/// them.
nn::NamedTensors tensors_of(const Place& place);

/// The place with other tensors in place of its own, in that order.
Place with_tensors(Place place, const nn::NamedTensors& tensors);

/// Bytes of these tensors.
std::int64_t tensor_bytes(const Place& place);

}  // namespace fastweights::detail
