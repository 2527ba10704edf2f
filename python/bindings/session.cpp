#include "fastweights/session/session.hpp"

#include "fastweights/session/consolidation.hpp"

#include <ATen/ATen.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "end_to_end_fields.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/nn/language_model.hpp"
#include "guarded.hpp"
#include "named_tensors.hpp"
#include "policy_fields.hpp"
#include "protection_fields.hpp"
#include "session_calls.hpp"
#include "session_fields.hpp"
#include "store_fields.hpp"
#include "write_fields.hpp"

namespace fastweights::python {
namespace {

namespace py = pybind11;
using Model = std::shared_ptr<nn::LanguageModelImpl>;
using Path = std::filesystem::path;

at::Tensor to_tensor(const std::vector<float>& values) {
  at::Tensor tensor = at::empty({static_cast<std::int64_t>(values.size())}, at::kFloat);
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<float>());
  return tensor;
}

std::unique_ptr<GuardedSession> make(const Model& model, const SessionFields& options) {
  return std::make_unique<GuardedSession>("session", Session(model, to_session_options(options)));
}

std::unique_ptr<GuardedSession> load(const Path& path, const Model& model) {
  return std::make_unique<GuardedSession>("session", Session::load(path, model));
}

void read(GuardedSession& self, const py::bytes& text, const py::object& progress) {
  const std::string_view view(text);
  self.use([&](Session& session) { session.read(view, progress_of(progress)); });
}

at::Tensor read_and_score(GuardedSession& self, const py::bytes& text, const py::object& progress) {
  const std::string_view view(text);
  return to_tensor(self.use(
      [&](Session& session) { return session.read_and_score(view, progress_of(progress)); }));
}

double score(GuardedSession& self, const py::bytes& text, const py::object& progress) {
  const std::string_view view(text);
  return self.use([&](Session& session) { return session.score(view, progress_of(progress)); });
}

at::Tensor token_bits(GuardedSession& self, const py::bytes& text, const py::object& progress) {
  const std::string_view view(text);
  return to_tensor(
      self.use([&](Session& session) { return session.token_bits(view, progress_of(progress)); }));
}

py::bytes write(GuardedSession& self, const WriteFields& fields) {
  const WriteOptions options = to_write_options(fields);
  return py::bytes(self.use([&](Session& session) { return session.write(options); }));
}

/// (kind, bytes) of each call: what was read and written.
std::vector<std::pair<std::string, py::bytes>> log(GuardedSession& self) {
  const SessionLog log = self.use([](Session& session) { return session.log(); });
  std::vector<std::pair<std::string, py::bytes>> calls;
  std::int64_t begin = log.start();
  for (const LogCall& call : log.calls()) {
    const auto tokens = log.tokens(begin, begin + call.tokens);
    calls.emplace_back(call.kind == CallKind::kRead ? "read" : "written",
                       io::ByteTokenizer().decode(tokens));
    begin += call.tokens;
  }
  return calls;
}

/// A place as Python gives it: whether it is a mark, and the mark's number or the position.
using Point = std::pair<bool, std::uint64_t>;

TextPoint to_point(const Point& point) {
  if (point.first) return Mark{point.second};
  return static_cast<std::int64_t>(point.second);
}

void rollback(GuardedSession& self, const Point& to, const py::object& progress) {
  self.use([&](Session& session) { session.rollback(to_point(to), progress_of(progress)); });
}

void feedback(GuardedSession& self, const Point& from, const std::optional<Point>& to, float r,
              const py::object& progress) {
  self.use([&](Session& session) {
    if (to) {
      session.feedback(to_point(from), to_point(*to), r, progress_of(progress));
    } else {
      session.feedback(to_point(from), r, progress_of(progress));
    }
  });
}

void reward(GuardedSession& self, float r, double half_life, const py::object& progress) {
  self.use([&](Session& session) { session.reward(r, half_life, progress_of(progress)); });
}

void correct(GuardedSession& self, const Point& since, const py::bytes& better, float r,
             const py::object& progress) {
  const std::string_view view(better);
  self.use(
      [&](Session& session) { session.correct(to_point(since), view, r, progress_of(progress)); });
}

void revoke(GuardedSession& self, const Point& from, const Point& to, const py::object& progress) {
  self.use([&](Session& session) {
    session.revoke(to_point(from), to_point(to), progress_of(progress));
  });
}

void merge(GuardedSession& self, GuardedSession& other, const py::object& progress) {
  const Session copy = other.use([](Session& session) { return session; });
  self.use([&](Session& session) { session.merge(copy, progress_of(progress)); });
}

std::vector<std::uint64_t> marks(GuardedSession& self) {
  std::vector<std::uint64_t> numbers;
  for (const Mark& mark : self.use([](Session& session) { return session.marks(); })) {
    numbers.push_back(mark.id);
  }
  return numbers;
}

/// (begin, end, strength) of each span whose strength is not 1.
std::vector<std::tuple<std::int64_t, std::int64_t, float>> strengths(GuardedSession& self) {
  std::vector<std::tuple<std::int64_t, std::int64_t, float>> spans;
  const SessionLog log = self.use([](Session& session) { return session.log(); });
  for (const StrengthSpan& span : log.strengths()) {
    spans.emplace_back(span.begin, span.end, span.strength);
  }
  return spans;
}

py::dict report(GuardedSession& self) {
  const SessionReport report = self.use([](Session& session) { return session.report(); });
  py::dict out;
  out["read"] = report.read;
  out["written"] = report.written;
  out["committed"] = report.committed;
  out["checkpoints"] = report.checkpoints;
  out["checkpoint_bytes"] = report.checkpoint_bytes;
  out["log_bytes"] = report.log_bytes;
  out["marks"] = report.marks;
  out["limited_writes"] = report.limited_writes;
  out["capped_norms"] = report.capped_norms;
  out["refused_writes"] = report.refused_writes;
  out["store_tokens"] = report.store_tokens;
  out["store_bytes"] = report.store_bytes;
  return out;
}

/// The session of a log that is that of `self`, replayed from the start.
std::unique_ptr<GuardedSession> replayed(GuardedSession& self, const Model& model,
                                         const SessionFields& options, const py::object& progress) {
  const SessionLog log = self.use([](Session& session) { return session.log(); });
  const py::gil_scoped_release no_gil;
  return std::make_unique<GuardedSession>(
      "session", Session::from_log(model, log, to_session_options(options), progress_of(progress)));
}

std::unique_ptr<GuardedSession> rebase(GuardedSession& self, const Model& model,
                                       const py::object& progress) {
  return std::make_unique<GuardedSession>("session", self.use([&](Session& session) {
    return fastweights::rebase(session, model, progress_of(progress));
  }));
}

py::tuple to_tuple(const ConsolidationTrial& trial) {
  return py::make_tuple(trial.memory_share, trial.head_share, trial.protection, trial.trial_bits,
                        trial.guarded_bits, trial.feed_forward_share);
}

/// (model, before, chosen, trials).
py::tuple consolidate(GuardedSession& self, const std::string& trial, const std::string& guarded,
                      double tolerance, bool memory, bool head, bool feed_forward,
                      std::int64_t rank, const py::object& progress) {
  const ConsolidationOptions options{trial, guarded, tolerance, memory, head, feed_forward, rank};
  const Consolidation result = self.use([&](Session& session) {
    return fastweights::consolidate(session, options, progress_of(progress));
  });
  py::list trials;
  for (const auto& each : result.trials) trials.append(to_tuple(each));
  return py::make_tuple(std::const_pointer_cast<nn::LanguageModelImpl>(result.model),
                        to_tuple(result.before), to_tuple(result.chosen), trials);
}

std::unique_ptr<GuardedSession> copy(GuardedSession& self) {
  return std::make_unique<GuardedSession>("session",
                                          self.use([](Session& session) { return session; }));
}

}  // namespace

void bind_session(py::module_& module) {
  module.def(
      "protect_keys",
      [](const Model& model, const py::bytes& text, double share, std::int64_t most,
         double least_free) {
        const std::string_view view(text);
        const py::gil_scoped_release no_gil;
        return to_fields(protect_keys(model, view, {share, most, least_free}));
      },
      py::arg("model"), py::arg("text"), py::arg("share"), py::arg("most"), py::arg("least_free"));
  py::class_<GuardedSession>(module, "Session")
      .def(py::init(&make), py::arg("model"), py::arg("options"))
      .def("protection",
           [](GuardedSession& self) {
             return to_fields(self.use([](Session& s) { return s.options().protection; }));
           })
      .def("end_to_end_options",
           [](GuardedSession& self) {
             return to_fields(self.use([](Session& s) { return s.options().end_to_end; }));
           })
      .def("policy",
           [](GuardedSession& self) {
             return to_fields(self.use([](Session& s) { return s.options().policy; }));
           })
      .def("store_options",
           [](GuardedSession& self) {
             return to_fields(self.use([](Session& s) { return s.options().store; }));
           })
      .def_static("load", &load, py::arg("path"), py::arg("model"),
                  py::call_guard<py::gil_scoped_release>())
      .def("read", &read, py::arg("text"), py::arg("progress"))
      .def("read_and_score", &read_and_score, py::arg("text"), py::arg("progress"))
      .def("score", &score, py::arg("text"), py::arg("progress"))
      .def("token_bits", &token_bits, py::arg("text"), py::arg("progress"))
      .def("write", &write, py::arg("options"))
      .def("logits",
           [](GuardedSession& self) { return self.use([](Session& s) { return s.logits(); }); })
      .def("state",
           [](GuardedSession& self) {
             return to_dict(self.use([](Session& s) { return s.state(); }));
           })
      .def("position",
           [](GuardedSession& self) { return self.use([](Session& s) { return s.position(); }); })
      .def("fused",
           [](GuardedSession& self) { return self.use([](Session& s) { return s.fused(); }); })
      .def("log", &log)
      .def("mark",
           [](GuardedSession& self) { return self.use([](Session& s) { return s.mark().id; }); })
      .def("marks", &marks)
      .def(
          "position_of",
          [](GuardedSession& self, std::uint64_t mark) {
            return self.use([&](Session& s) { return s.position(Mark{mark}); });
          },
          py::arg("mark"))
      .def("rollback", &rollback, py::arg("to"), py::arg("progress"))
      .def("feedback", &feedback, py::arg("start"), py::arg("end"), py::arg("r"),
           py::arg("progress"))
      .def("reward", &reward, py::arg("r"), py::arg("half_life"), py::arg("progress"))
      .def("correct", &correct, py::arg("since"), py::arg("better"), py::arg("r"),
           py::arg("progress"))
      .def("revoke", &revoke, py::arg("start"), py::arg("end"), py::arg("progress"))
      .def("merge", &merge, py::arg("other"), py::arg("progress"))
      .def("commit", [](GuardedSession& self) { self.use([](Session& s) { s.commit(); }); })
      .def("strengths", &strengths)
      .def("report", &report)
      .def("replayed", &replayed, py::arg("model"), py::arg("options"), py::arg("progress"))
      .def(
          "save",
          [](GuardedSession& self, const Path& path) {
            self.use([&](Session& session) { session.save(path); });
          },
          py::arg("path"))
      .def("consolidate", &consolidate, py::arg("trial"), py::arg("guarded"), py::arg("tolerance"),
           py::arg("memory"), py::arg("head"), py::arg("feed_forward"), py::arg("rank"),
           py::arg("progress"))
      .def("rebase", &rebase, py::arg("model"), py::arg("progress"))
      .def("copy", &copy);
}

}  // namespace fastweights::python
