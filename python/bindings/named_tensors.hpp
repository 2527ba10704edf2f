#pragma once

#include <pybind11/pybind11.h>

#include "fastweights/nn/state.hpp"

namespace fastweights::python {

/// A dict of names and tensors, in its order.
/// @throws TypeError unless the keys are str and the values tensors
nn::NamedTensors to_named_tensors(const pybind11::dict& tensors);

pybind11::dict to_dict(const nn::NamedTensors& tensors);

}  // namespace fastweights::python
