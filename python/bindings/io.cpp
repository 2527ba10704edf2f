#include <ATen/ATen.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "bindings.hpp"
#include "fastweights/io/atomic_file.hpp"
#include "fastweights/io/safetensors.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/nn/tensor_file.hpp"
#include "named_tensors.hpp"

namespace fastweights::python {
namespace {

namespace py = pybind11;
using Path = std::filesystem::path;

at::Tensor encode(const io::ByteTokenizer& tokenizer, const py::bytes& text) {
  const auto tokens = tokenizer.encode(std::string_view(text));
  auto tensor = at::empty({static_cast<std::int64_t>(tokens.size())}, at::kLong);
  std::copy(tokens.begin(), tokens.end(), tensor.mutable_data_ptr<std::int64_t>());
  return tensor;
}

py::bytes decode(const io::ByteTokenizer& tokenizer, const at::Tensor& tokens) {
  const auto contiguous = tokens.to(at::kCPU, at::kLong).contiguous();
  return py::bytes(tokenizer.decode(std::span(contiguous.const_data_ptr<std::int64_t>(),
                                              static_cast<std::size_t>(contiguous.numel()))));
}

void bind_files(py::module_& module) {
  module.def(
      "load_tensors",
      [](const Path& path) {
        const auto tensors = [&] {
          const py::gil_scoped_release no_gil;
          return nn::load_tensors(path);
        }();
        return to_dict(tensors);
      },
      py::arg("path"));
  module.def(
      "save_tensors",
      [](const Path& path, const py::dict& tensors, const io::Metadata& metadata) {
        const auto named = to_named_tensors(tensors);
        const py::gil_scoped_release no_gil;
        nn::save_tensors(path, named, metadata);
      },
      py::arg("path"), py::arg("tensors"), py::arg("metadata") = io::Metadata());
  module.def(
      "load_metadata", [](const Path& path) { return io::SafetensorsFile(path).view().metadata(); },
      py::arg("path"));
  module.def(
      "write_text",
      [](const Path& path, const std::string& text) { io::write_file_atomically(path, text); },
      py::arg("path"), py::arg("text"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_io(py::module_& module) {
  bind_files(module);
  py::class_<io::ByteTokenizer>(module, "ByteTokenizer")
      .def(py::init<>())
      .def_property_readonly_static(
          "vocabulary_size", [](const py::object&) { return io::ByteTokenizer::kVocabularySize; })
      .def("encode", &encode, py::arg("text"))
      .def("decode", &decode, py::arg("tokens"));
}

}  // namespace fastweights::python
