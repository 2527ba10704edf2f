#include "fastweights/session/judging.hpp"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "session_calls.hpp"
#include "write_fields.hpp"

namespace fastweights::python {
namespace {

namespace py = pybind11;

/// A judge of the library, which a loop calls without the GIL.
struct NativeJudge {
  Judge judge;
};

/// (choice, strength, correction).
using JudgementFields = std::tuple<std::int64_t, float, std::string>;

Judgement to_judgement(JudgementFields fields) {
  return {std::get<0>(fields), std::get<1>(fields), std::move(std::get<2>(fields))};
}

py::tuple to_tuple(const Judgement& judgement) {
  return py::make_tuple(judgement.choice, judgement.strength, py::bytes(judgement.correction));
}

std::unique_ptr<GuardedSession> lent(const Session& session) {
  return std::make_unique<GuardedSession>("session", session);
}

/// A judge that asks a Python callable: (before, [(text, after)]) → fields.
Judge judge_of(const py::object& callable) {
  if (py::isinstance<NativeJudge>(callable)) return callable.cast<NativeJudge&>().judge;
  return [&callable](const Session& before, std::span<const Candidate> candidates) {
    const py::gil_scoped_acquire gil;
    py::list list;
    for (const Candidate& candidate : candidates) {
      list.append(py::make_tuple(py::bytes(candidate.text), lent(candidate.after)));
    }
    return to_judgement(callable(lent(before), list).cast<JudgementFields>());
  };
}

/// (position, text, judgement) of each passage.
py::list write_judged(GuardedSession& self, const py::object& judge, std::int64_t passages,
                      std::int64_t candidates, const WriteFields& write,
                      const py::object& progress) {
  const JudgedWriteOptions options{
      .write = to_write_options(write), .passages = passages, .candidates = candidates};
  const Judge native = judge_of(judge);
  const auto written = self.use([&](Session& session) {
    return fastweights::write_judged(session, native, options, progress_of(progress));
  });
  py::list out;
  for (const JudgedPassage& passage : written) {
    out.append(
        py::make_tuple(passage.position, py::bytes(passage.text), to_tuple(passage.judgement)));
  }
  return out;
}

py::tuple call(const NativeJudge& self, GuardedSession& before,
               const std::vector<std::pair<std::string, GuardedSession*>>& candidates) {
  std::vector<Candidate> copies;
  const auto copy = [](Session& session) { return session; };
  for (const auto& [text, after] : candidates) copies.push_back({text, after->use(copy)});
  return to_tuple(before.use([&](const Session& session) { return self.judge(session, copies); }));
}

NativeJudge facts(const std::vector<std::tuple<std::string, std::string, std::string>>& sheet,
                  float right, float wrong, float silent, bool correct) {
  std::vector<Fact> all;
  for (const auto& [cue, value, statement] : sheet) all.push_back({cue, value, statement});
  return {fact_judge(std::move(all), {right, wrong, silent, correct})};
}

NativeJudge likelihood(std::string held_out, double tolerance, float better, float worse) {
  return {likelihood_judge(std::move(held_out), {tolerance, better, worse})};
}

NativeJudge preference(const py::function& second_is_better) {
  // The last copy of the judge may go where the GIL is not held.
  const std::shared_ptr<py::function> callable(new py::function(second_is_better),
                                               [](py::function* function) {
                                                 const py::gil_scoped_acquire gil;
                                                 delete function;
                                               });
  return {preference_judge([callable](std::string_view first, std::string_view second) {
    const py::gil_scoped_acquire gil;
    return (*callable)(py::bytes(first.data(), first.size()),
                       py::bytes(second.data(), second.size()))
        .cast<bool>();
  })};
}

}  // namespace

void bind_judging(py::module_& module) {
  py::class_<NativeJudge>(module, "Judge")
      .def("__call__", &call, py::arg("before"), py::arg("candidates"));
  module.def("write_judged", &write_judged, py::arg("session"), py::arg("judge"),
             py::arg("passages"), py::arg("candidates"), py::arg("options"), py::arg("progress"));
  module.def("fact_judge", &facts, py::arg("facts"), py::arg("right"), py::arg("wrong"),
             py::arg("silent"), py::arg("correct"));
  module.def("likelihood_judge", &likelihood, py::arg("held_out"), py::arg("tolerance"),
             py::arg("better"), py::arg("worse"));
  module.def("preference_judge", &preference, py::arg("second_is_better"));
}

}  // namespace fastweights::python
