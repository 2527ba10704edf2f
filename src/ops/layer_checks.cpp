#include "layer_checks.hpp"

#include <sstream>
#include <string>

#include "fastweights/core/error.hpp"

namespace fastweights::detail {
namespace {

std::string shape_string(c10::SymIntArrayRef shape) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << ']';
  return out.str();
}

[[noreturn]] void throw_shape_error(std::string_view op, std::string_view name,
                                    std::string_view expected, const at::Tensor& given) {
  std::ostringstream message;
  message << op << ": " << name << " must be " << expected << ", got "
          << (given.defined() ? shape_string(given.sym_sizes()) : "an undefined tensor");
  throw ShapeError(message.str());
}

}  // namespace

void check_shape(std::string_view op, std::string_view name, const at::Tensor& tensor,
                 std::string_view layout, c10::SymIntArrayRef expected) {
  if (tensor.defined() && tensor.sym_sizes() == expected) return;
  throw_shape_error(op, name, std::string(layout) + " = " + shape_string(expected), tensor);
}

void check_dim(std::string_view op, std::string_view name, const at::Tensor& tensor,
               std::string_view layout, int64_t dim) {
  if (tensor.defined() && tensor.dim() == dim) return;
  throw_shape_error(op, name, layout, tensor);
}

void check_floating(std::string_view op, std::string_view name, const at::Tensor& tensor) {
  if (tensor.is_floating_point()) return;
  std::ostringstream message;
  message << op << ": " << name << " must be of a floating-point type, got "
          << tensor.scalar_type();
  throw ShapeError(message.str());
}

void check_that(bool condition, std::string_view op, std::string_view message) {
  if (!condition) throw ShapeError(std::string(op) + ": " + std::string(message));
}

}  // namespace fastweights::detail
