/// \file
/// The parts of the Python module `fastweights._C`. Each binds one room of the library.
#pragma once

#include <pybind11/pybind11.h>

namespace fastweights::python {

/// Makes the library's exceptions arrive as those of `fastweights.errors`; call this first.
void bind_errors(pybind11::module_& module);
/// `operator_`: the registered operators, called without losing the types of their exceptions.
void bind_operators(pybind11::module_& module);
/// Tensor files, atomic text files, the byte tokenizer.
void bind_io(pybind11::module_& module);
/// `LanguageModel`, the C++ model, and `parse_config`.
void bind_model(pybind11::module_& module);
/// `ExactStore`.
void bind_exact_store(pybind11::module_& module);
/// `Session`.
void bind_session(pybind11::module_& module);
/// `Judge`, and writing that is judged; after `Session`.
void bind_judging(pybind11::module_& module);
/// `SessionPool`; after `Session`, which it lends.
void bind_session_pool(pybind11::module_& module);

}  // namespace fastweights::python
