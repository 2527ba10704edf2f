#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings.hpp"

namespace fastweights::python {
namespace {

namespace py = pybind11;

constexpr const char* kNamespace = "fastweights";

py::object call(const c10::OperatorHandle& op, const std::string& name, const py::args& args,
                const py::kwargs& kwargs) {
  auto overridden =
      torch::jit::_maybe_handle_torch_function(kNamespace, name, "", false, args, kwargs);
  if (overridden) return *overridden;
  auto stack = torch::jit::createStackForSchema(op.schema(), torch::jit::tuple_slice(args), kwargs,
                                                std::nullopt);
  {
    const py::gil_scoped_release no_gil;
    op.callBoxed(&stack);
  }
  return torch::jit::createPyObjectForStack(std::move(stack));
}

// The same call as torch.ops.fastweights.<name>, through the same dispatcher; but torch.ops turns
// every C++ exception into a RuntimeError before anyone can see its type.
py::object make_operator(const std::string& name) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(
      (std::string(kNamespace) + "::" + name).c_str(), "");
  return py::cpp_function(
      [op, name](const py::args& args, const py::kwargs& kwargs) {
        return call(op, name, args, kwargs);
      },
      py::name(name.c_str()));
}

}  // namespace

void bind_operators(py::module_& module) {
  module.def("operator_", &make_operator, py::arg("name"),
             "The operator fastweights::name as a function that raises the errors of "
             "fastweights.errors.");
}

}  // namespace fastweights::python
