#include <ATen/ATen.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "bindings.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/nn/initial_values.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/nn/model_folder.hpp"
#include "named_tensors.hpp"

namespace fastweights::python {
namespace {

namespace py = pybind11;
using Model = nn::LanguageModelImpl;
using Path = std::filesystem::path;

// Puts the default generator back: initial weights that are thrown away must not move the caller's
// random numbers.
class KeepRandomNumbers {
 public:
  KeepRandomNumbers()
      : generator_(at::globalContext().defaultGenerator(at::kCPU)),
        state_(generator_.get_state()) {}
  KeepRandomNumbers(const KeepRandomNumbers&) = delete;
  KeepRandomNumbers& operator=(const KeepRandomNumbers&) = delete;
  ~KeepRandomNumbers() {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    generator_.set_state(state_);
  }

 private:
  at::Generator generator_;
  at::Tensor state_;
};

// A model whose parameters are the given tensors: they share storage.
std::shared_ptr<Model> from_tensors(const std::string& config, const py::dict& tensors) {
  const KeepRandomNumbers keep;
  const nn::WithoutInitialValues fast;
  auto model = std::make_shared<Model>(nn::LanguageModelConfig::from_json(config));
  std::map<std::string, at::Tensor> given;
  for (auto& [name, tensor] : to_named_tensors(tensors)) given.emplace(name, tensor);
  for (auto& item : model->named_parameters()) {
    const auto found = given.find(item.key());
    if (found == given.end()) throw StateMismatch("model: tensor " + item.key() + " is missing");
    if (found->second.sizes() != item.value().sizes()) {
      throw StateMismatch("model: tensor " + item.key() + " must be " +
                          c10::str(item.value().sizes()) + ", got " +
                          c10::str(found->second.sizes()));
    }
    item.value().set_data(found->second.detach());
    item.value().requires_grad_(false);
    given.erase(found);
  }
  if (!given.empty())
    throw StateMismatch("model: tensor " + given.begin()->first + " is not known");
  model->eval();
  return model;
}

std::shared_ptr<Model> load(const Path& path, at::ScalarType dtype, const std::string& changes) {
  const KeepRandomNumbers keep;
  const auto change = [&](nn::LanguageModelConfig& config) { config = config.with(changes); };
  return std::const_pointer_cast<Model>(load_model(path, dtype, change));
}

py::dict tensors_of(const Model& model) {
  nn::NamedTensors named;
  for (const auto& item : model.named_parameters()) named.emplace_back(item.key(), item.value());
  return to_dict(named);
}

void enable_branches(Model& model, std::size_t layer, bool attention, bool memory) {
  auto& block = model.blocks.at(layer);
  block->attention_enabled = attention;
  block->memory_enabled = memory;
}

py::tuple forward(const Model& model, const at::Tensor& tokens,
                  const std::optional<py::dict>& state, bool last_logits_only) {
  const auto before = state ? nn::LanguageModelState::from_tensors(to_named_tensors(*state))
                            : model.initial_state(tokens.dim() > 0 ? tokens.size(0) : 0);
  const auto output = [&] {
    const py::gil_scoped_release no_gil;
    const at::NoGradGuard no_grad;
    return model.forward(tokens, before, {.last_logits_only = last_logits_only});
  }();
  return py::make_tuple(output.logits, to_dict(output.state.tensors()));
}

}  // namespace

void bind_model(py::module_& module) {
  module.def(
      "parse_config",
      [](const std::string& json) { return nn::LanguageModelConfig::from_json(json).to_json(); },
      py::arg("json"), "Checks a configuration and returns it with every key.");
  py::class_<Model, std::shared_ptr<Model>>(module, "LanguageModel")
      .def_static("from_tensors", &from_tensors, py::arg("config"), py::arg("tensors"))
      .def_static("load", &load, py::arg("path"), py::arg("dtype") = at::kFloat,
                  py::arg("changes") = "{}", py::call_guard<py::gil_scoped_release>())
      .def(
          "save",
          [](const Model& model, const Path& path, std::optional<at::ScalarType> dtype) {
            save_model(path, model, dtype);
          },
          py::arg("path"), py::arg("dtype") = py::none(), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("config", [](const Model& model) { return model.config().to_json(); })
      .def("tensors", &tensors_of)
      .def("forward", &forward, py::arg("tokens"), py::arg("state") = py::none(),
           py::arg("last_logits_only") = false)
      .def(
          "initial_state",
          [](const Model& model, std::int64_t batch) {
            return to_dict(model.initial_state(batch).tensors());
          },
          py::arg("batch"))
      .def("enable_branches", &enable_branches, py::arg("layer"), py::arg("attention"),
           py::arg("memory"))
      .def("parameter_count", &Model::parameter_count)
      .def("state_bytes", &Model::state_bytes, py::arg("batch") = 1);
}

}  // namespace fastweights::python
