#include "fastweights/session/exact_store.hpp"

#include <ATen/ATen.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../../src/ops/layer_op.hpp"
#include "../../src/session/recollection.hpp"
#include "bindings.hpp"
#include "fastweights/core/error.hpp"
#include "guarded.hpp"
#include "named_tensors.hpp"
#include "store_fields.hpp"

namespace fastweights::python {
namespace {

namespace py = pybind11;

using GuardedStore = Guarded<ExactStore>;

/// The elements of a tensor of this shape and type, contiguous on the CPU.
template <class T>
std::span<const T> elements(const char* name, const at::Tensor& tensor, at::ScalarType type,
                            at::IntArrayRef shape) {
  if (tensor.scalar_type() != type || tensor.sizes() != shape || !tensor.device().is_cpu() ||
      !tensor.is_contiguous()) {
    throw ShapeError("exact_store: " + std::string(name) + " must be a contiguous CPU tensor, " +
                     c10::toString(type) + " " + c10::str(shape) + ", got " +
                     c10::toString(tensor.scalar_type()) + " " + c10::str(tensor.sizes()));
  }
  return {tensor.const_data_ptr<T>(), static_cast<std::size_t>(tensor.numel())};
}

std::span<float> elements(at::Tensor& tensor) {
  return {tensor.mutable_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
}

std::unique_ptr<GuardedStore> make(std::int64_t hidden_size, std::int64_t vocabulary_size,
                                   const StoreFields& options) {
  return std::make_unique<GuardedStore>(
      "exact_store", ExactStore(hidden_size, vocabulary_size, to_store_options(options)));
}

at::Tensor read(GuardedStore& self, const at::Tensor& tokens, const at::Tensor& hidden,
                const at::Tensor& logits, const std::optional<at::Tensor>& strengths) {
  return self.use([&](ExactStore& store) {
    const std::int64_t count = tokens.dim() == 1 ? tokens.size(0) : -1;
    const auto vocabulary = store.vocabulary_size();
    ExactStore::Batch batch{
        elements<std::int64_t>("tokens", tokens, at::kLong, {std::max<std::int64_t>(count, 0)}),
        elements<float>("hidden", hidden, at::kFloat, {count, store.hidden_size()}),
        elements<float>("logits", logits, at::kFloat, {count, vocabulary})};
    if (strengths) {
      batch.strengths = elements<float>("strengths", *strengths, at::kFloat, {count});
    }
    at::Tensor out = at::empty({count, vocabulary}, at::kFloat);
    store.read(batch, elements(out), detail::parallel_executor());
    return out;
  });
}

at::Tensor predict(GuardedStore& self, const at::Tensor& hidden, const at::Tensor& logits) {
  return self.use([&](ExactStore& store) {
    const auto state = elements<float>("hidden", hidden, at::kFloat, {store.hidden_size()});
    const auto model = elements<float>("logits", logits, at::kFloat, {store.vocabulary_size()});
    at::Tensor out = at::empty({store.vocabulary_size()}, at::kFloat);
    store.mix(store.recall(state, detail::parallel_executor()), model, elements(out));
    return out;
  });
}

std::optional<io::ScalarType> stored_type(at::ScalarType type) {
  for (const auto stored : {io::ScalarType::F64, io::ScalarType::F32, io::ScalarType::I64,
                            io::ScalarType::I8, io::ScalarType::U8}) {
    if (detail::torch_type(stored) == type) return stored;
  }
  return std::nullopt;
}

py::dict tensors(GuardedStore& self) {
  return to_dict(
      detail::to_named_tensors(self.use([](ExactStore& store) { return store.tensors(); })));
}

std::unique_ptr<GuardedStore> from_tensors(std::int64_t hidden_size, std::int64_t vocabulary_size,
                                           const py::dict& tensors) {
  nn::NamedTensors named = to_named_tensors(tensors);
  std::vector<io::TensorData> views;
  for (auto& [name, tensor] : named) {
    const auto type = stored_type(tensor.scalar_type());
    if (!type) continue;  // none of a store's
    tensor = tensor.cpu().contiguous();
    views.push_back({name,
                     *type,
                     tensor.sizes().vec(),
                     {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()}});
  }
  return std::make_unique<GuardedStore>(
      "exact_store", ExactStore::from_tensors(hidden_size, vocabulary_size, views));
}

template <class Value>
auto getter(Value value) {
  return [value](GuardedStore& self) { return self.use(value); };
}

}  // namespace

void bind_exact_store(py::module_& module) {
  using Checkpoint = ExactStore::Checkpoint;
  py::class_<Checkpoint>(module, "ExactStoreCheckpoint")
      .def_property_readonly("size", [](const Checkpoint& self) { return self.size; });
  py::class_<GuardedStore>(module, "ExactStore")
      .def(py::init(&make), py::arg("hidden_size"), py::arg("vocabulary_size"), py::arg("options"))
      .def("read", &read, py::arg("tokens"), py::arg("hidden"), py::arg("logits"),
           py::arg("strengths"))
      .def("predict", &predict, py::arg("hidden"), py::arg("logits"))
      .def("size", getter([](ExactStore& store) { return store.size(); }))
      .def("bytes", getter([](ExactStore& store) { return store.bytes(); }))
      .def("checkpoint", getter([](ExactStore& store) { return store.checkpoint(); }))
      .def("rollback",
           [](GuardedStore& self, const Checkpoint& checkpoint) {
             self.use([&](ExactStore& store) { store.rollback(checkpoint); });
           })
      .def("tensors", &tensors)
      .def_static("from_tensors", &from_tensors, py::arg("hidden_size"), py::arg("vocabulary_size"),
                  py::arg("tensors"))
      .def("copy", [](GuardedStore& self) {
        return std::make_unique<GuardedStore>("exact_store",
                                              self.use([](ExactStore& store) { return store; }));
      });
}

}  // namespace fastweights::python
