#include "rule_checks.hpp"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "compute_type.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/core/params.hpp"
#include "layer_op.hpp"

namespace fastweights::detail {
namespace {

using at::Tensor;

bool equal_shapes(c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

void check_head_size(const char* rule, const char* name, const c10::SymInt& size) {
  const auto known = size.maybe_as_int();
  if (known && (*known < 1 || *known > core::kMaxHeadSize)) {
    refuse(rule, fmt::format("{} must be from 1 to {}, got {}", name, core::kMaxHeadSize, *known));
  }
}

}  // namespace

std::string shape_text(c10::SymIntArrayRef sizes) {
  std::vector<std::string> parts;
  for (const auto& size : sizes) {
    const auto known = size.maybe_as_int();
    parts.push_back(known ? std::to_string(*known) : "?");
  }
  return fmt::format("[{}]", fmt::join(parts, ", "));
}

void refuse(const char* rule, const std::string& message) {
  throw ShapeError(fmt::format("{}: {}", rule, message));
}

void check_shape(const char* rule, const char* name, const Tensor& tensor, const char* letters,
                 c10::SymIntArrayRef expected) {
  if (equal_shapes(tensor.sym_sizes(), expected)) return;
  refuse(rule, fmt::format("{} must be {} = {}, got {}", name, letters, shape_text(expected),
                           shape_text(tensor.sym_sizes())));
}

void check_type(const char* rule, const char* name, const Tensor& tensor,
                std::initializer_list<at::ScalarType> allowed) {
  std::vector<std::string> names;
  for (const auto type : allowed) {
    if (tensor.scalar_type() == type) return;
    if (names.empty() || names.back() != c10::toString(type)) names.push_back(c10::toString(type));
  }
  refuse(rule, fmt::format("{} must be {}, got {}", name, fmt::join(names, " or "),
                           c10::toString(tensor.scalar_type())));
}

void check_device(const char* rule, const char* name, const Tensor& tensor, const Tensor& q) {
  if (tensor.device() == q.device()) return;
  refuse(rule, fmt::format("{} must be on {} like q, got {}", name, q.device().str(),
                           tensor.device().str()));
}

void check_query(const char* rule, const Tensor& q) {
  if (q.dim() != 4) refuse(rule, "q must be [B, T, H, K], got " + shape_text(q.sym_sizes()));
  check_type(rule, "q", q, {at::kBFloat16, at::kHalf, at::kFloat, at::kDouble});
}

void check_value(const char* rule, const Tensor& q, const Tensor& v) {
  if (v.dim() != 4 || v.sym_size(0) != q.sym_size(0) || v.sym_size(1) != q.sym_size(1)) {
    refuse(rule, fmt::format("v must be [B, T, HV, V] with B = {} and T = {}, got {}",
                             shape_text({q.sym_size(0)}), shape_text({q.sym_size(1)}),
                             shape_text(v.sym_sizes())));
  }
  const auto heads = q.sym_size(2).maybe_as_int();
  const auto value_heads = v.sym_size(2).maybe_as_int();
  if (heads && value_heads && (*heads < 1 || *value_heads < 1 || *value_heads % *heads != 0)) {
    refuse(rule, fmt::format("v must have a positive multiple of q's heads, H = {}, got HV = {}",
                             *heads, *value_heads));
  }
  check_head_size(rule, "K", q.sym_size(3));
  check_head_size(rule, "V", v.sym_size(3));
}

void check_packing(const char* rule, const Tensor& q, const Tensor& cu_seqlens) {
  if (cu_seqlens.dim() != 1 || cu_seqlens.sym_size(0) < 1) {
    refuse(rule, "cu_seqlens must be [N + 1], got " + shape_text(cu_seqlens.sym_sizes()));
  }
  check_type(rule, "cu_seqlens", cu_seqlens, {at::kLong});
  check_device(rule, "cu_seqlens", cu_seqlens, q);
  if (q.sym_size(0) != 1) {
    refuse(rule, "cu_seqlens needs packed input with B = 1, got q " + shape_text(q.sym_sizes()));
  }
}

std::array<c10::SymInt, 4> state_shape(const Tensor& q, const Tensor& v, const Tensor& cu_seqlens) {
  const auto sequences = cu_seqlens.defined() ? cu_seqlens.sym_size(0) - 1 : q.sym_size(0);
  return {sequences, v.sym_size(2), q.sym_size(3), v.sym_size(3)};
}

void check_state(const char* rule, const char* name, const Tensor& state, const Tensor& q,
                 const Tensor& v, const Tensor& cu_seqlens) {
  check_shape(rule, name, state, cu_seqlens.defined() ? "[N, HV, K, V]" : "[B, HV, K, V]",
              state_shape(q, v, cu_seqlens));
  const auto type = compute_type(v);
  check_type(rule, name, state, {type, type == at::kFloat ? at::kBFloat16 : type});
  check_device(rule, name, state, q);
}

void make_rows_adjacent(Tensor& tensor) {
  if (!tensor.defined() || tensor.dim() < 4) return;
  if (tensor.size(3) != 1 && tensor.stride(3) != 1) tensor = tensor.contiguous();
}

void make_contiguous(Tensor& tensor) {
  if (tensor.defined() && !tensor.is_contiguous()) tensor = tensor.contiguous();
}

core::ConstView const_view(const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

core::View view(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

}  // namespace fastweights::detail
