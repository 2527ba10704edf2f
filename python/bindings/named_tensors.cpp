#include "named_tensors.hpp"

#include <torch/csrc/utils/pybind.h>

#include <string>

namespace fastweights::python {

namespace py = pybind11;

nn::NamedTensors to_named_tensors(const py::dict& tensors) {
  nn::NamedTensors named;
  for (const auto& [name, tensor] : tensors) {
    named.emplace_back(py::cast<std::string>(name), py::cast<at::Tensor>(tensor));
  }
  return named;
}

py::dict to_dict(const nn::NamedTensors& tensors) {
  py::dict dict;
  for (const auto& [name, tensor] : tensors) dict[py::str(name)] = tensor;
  return dict;
}

}  // namespace fastweights::python
