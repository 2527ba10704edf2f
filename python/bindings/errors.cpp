#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <cstring>
#include <exception>

#include "bindings.hpp"
#include "fastweights/core/error.hpp"

namespace fastweights::python {
namespace {

namespace py = pybind11;

// Text of an error may hold a file name that is no UTF-8.
void raise(const char* name, const char* message) {
  const auto type = py::module_::import("fastweights.errors").attr(name);
  const auto text = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
      message, static_cast<Py_ssize_t>(std::strlen(message)), "surrogateescape"));
  PyErr_SetObject(type.ptr(), text.ptr());
}

// What it does not know goes on to pybind11's own translators.
void translate(std::exception_ptr exception) {
  if (!exception) return;
  try {
    std::rethrow_exception(exception);
  } catch (const Cancelled& error) {
    raise("Cancelled", error.what());
  } catch (const StateMismatch& error) {
    raise("StateMismatch", error.what());
  } catch (const FileError& error) {
    raise("FileError", error.what());
  } catch (const ShapeError& error) {
    raise("ShapeError", error.what());
  } catch (const Error& error) {
    raise("Error", error.what());
  } catch (const torch::jit::schema_match_error& error) {
    py::set_error(PyExc_TypeError, error.what());
  } catch (const c10::Error&) {
    torch::translate_exception_to_python(exception);
  } catch (const python_error&) {
    torch::translate_exception_to_python(exception);
  }
}

}  // namespace

void bind_errors(py::module_& /*module*/) { py::register_local_exception_translator(&translate); }

}  // namespace fastweights::python
