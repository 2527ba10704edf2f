#include <torch/version.h>

#include "bindings.hpp"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled half of fastweights; use the package, not this module.";
  module.attr("torch_version") = TORCH_VERSION;
  fastweights::python::bind_errors(module);
  fastweights::python::bind_operators(module);
  fastweights::python::bind_io(module);
  fastweights::python::bind_model(module);
  fastweights::python::bind_exact_store(module);
  fastweights::python::bind_session(module);
  fastweights::python::bind_judging(module);
  fastweights::python::bind_session_pool(module);
}
