#include "fastweights/session/session_pool.hpp"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "fastweights/nn/language_model.hpp"
#include "session_calls.hpp"
#include "session_fields.hpp"
#include "write_fields.hpp"

namespace fastweights::python {
namespace {

namespace py = pybind11;
using Model = std::shared_ptr<nn::LanguageModelImpl>;
using Path = std::filesystem::path;

std::unique_ptr<SessionPool> make(const Model& model, std::int64_t memory_bytes, const Path& folder,
                                  const SessionFields& session, std::int64_t most_per_batch) {
  const auto poll = [] {
    const py::gil_scoped_acquire gil;
    check_signals();
  };
  return std::make_unique<SessionPool>(model,
                                       SessionPoolOptions{.memory_bytes = memory_bytes,
                                                          .folder = folder,
                                                          .session = to_session_options(session),
                                                          .most_per_batch = most_per_batch,
                                                          .poll = poll});
}

void add(SessionPool& self, const std::string& id, GuardedSession& session) {
  Session copy = session.use([](Session& value) { return value; });
  const py::gil_scoped_release no_gil;
  self.add(id, std::move(copy));
}

void read(SessionPool& self, const std::string& id, const py::bytes& text,
          const py::object& progress) {
  const std::string_view view(text);
  const Progress callback = progress.is_none() ? Progress() : progress_of(progress);
  const py::gil_scoped_release no_gil;
  self.read(id, view, callback);
}

py::bytes write(SessionPool& self, const std::string& id, const WriteFields& fields) {
  const WriteOptions options = to_write_options(fields, /*polls=*/false);  // the pool does
  std::string text;
  {
    const py::gil_scoped_release no_gil;
    text = self.write(id, options);
  }
  return py::bytes(text);
}

/// Lends the session to Python for as long as `work` runs.
py::object use(SessionPool& self, const std::string& id, const py::function& work) {
  py::object result;
  const auto lend = [&](Session& session) {
    const py::gil_scoped_acquire gil;
    auto lent = std::make_unique<GuardedSession>("session", std::move(session));
    GuardedSession& guarded = *lent;
    const py::object object = py::cast(std::move(lent));
    struct Return {
      Session& session;
      GuardedSession& guarded;
      ~Return() { session = guarded.take(); }
    } const give_back{session, guarded};
    result = work(object);
  };
  const py::gil_scoped_release no_gil;
  self.use(id, lend);
  return result;
}

py::dict report(const SessionPool& self) {
  const SessionPoolReport report = self.report();
  py::dict out;
  out["resident"] = report.resident;
  out["on_disk"] = report.on_disk;
  out["resident_bytes"] = report.resident_bytes;
  out["batches"] = report.batches;
  out["tokens_written"] = report.tokens_written;
  out["pieces_read"] = report.pieces_read;
  out["saves"] = report.saves;
  out["loads"] = report.loads;
  return out;
}

}  // namespace

void bind_session_pool(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<SessionPool>(module, "SessionPool")
      .def(py::init(&make), py::arg("model"), py::arg("memory_bytes"), py::arg("folder"),
           py::arg("session"), py::arg("most_per_batch"))
      .def("create", &SessionPool::create, py::arg("name"), py::arg("seed"), no_gil)
      .def("add", &add, py::arg("name"), py::arg("session"))
      .def("load", &SessionPool::load, py::arg("name"), py::arg("path"), no_gil)
      .def("close", &SessionPool::close, py::arg("name"), no_gil)
      .def("contains", &SessionPool::contains, py::arg("name"), no_gil)
      .def("ids", &SessionPool::ids, no_gil)
      .def("read", &read, py::arg("name"), py::arg("text"), py::arg("progress"))
      .def("write", &write, py::arg("name"), py::arg("options"))
      .def("save", &SessionPool::save, py::arg("name"), py::arg("path"), no_gil)
      .def("use", &use, py::arg("name"), py::arg("work"))
      .def("report", &report);
}

}  // namespace fastweights::python
