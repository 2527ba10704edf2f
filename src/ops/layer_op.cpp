#include "layer_op.hpp"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <string>
#include <utility>

#include "autograd_node.hpp"
#include "fastweights/core/error.hpp"

namespace fastweights::detail {
namespace {

using torch::autograd::SavedVariable;

struct LayerNode : torch::autograd::Node {
  std::string name() const override { return label; }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!gradients[0].defined()) return torch::autograd::variable_list(inputs.size());
    const auto unpack = [](const std::vector<SavedVariable>& saved) {
      Tensors tensors;
      for (const auto& variable : saved) tensors.push_back(variable.unpack());
      return tensors;
    };
    auto result = backward(gradients[0], unpack(inputs), unpack(kept));
    for (size_t i = 0; i < result.size(); ++i) {
      if (!should_compute_output(i)) result[i] = at::Tensor();
    }
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : inputs) variable.reset_data();
    for (auto& variable : kept) variable.reset_data();
  }

  std::string label;
  Backward backward;
  std::vector<SavedVariable> inputs, kept;
};

torch::autograd::edge_list next_edges(const Tensors& inputs) {
  torch::autograd::edge_list edges;
  for (const auto& input : inputs) {
    edges.push_back(input.defined() ? torch::autograd::impl::gradient_edge(input)
                                    : torch::autograd::Edge());
  }
  return edges;
}

bool needs_gradient(const Tensors& inputs) {
  bool any = false;
  for (const auto& input : inputs) any = any || (input.defined() && input.requires_grad());
  return any && at::GradMode::is_enabled();
}

}  // namespace

at::Tensor empty_as(const at::Tensor& tensor, std::optional<at::ScalarType> dtype) {
  return at::empty_symint(tensor.sym_sizes(),
                          tensor.options().dtype(dtype.value_or(tensor.scalar_type())));
}

core::DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return core::DType::kFloat64;
    case at::kFloat: return core::DType::kFloat32;
    case at::kHalf: return core::DType::kFloat16;
    case at::kBFloat16: return core::DType::kBFloat16;
    default:
      throw ShapeError(std::string("expected a floating-point tensor, got ") +
                       at::toString(tensor.scalar_type()));
  }
}

core::ConstArray const_array(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.const_data_ptr(), dtype_of(tensor)};
}

core::Array array(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.mutable_data_ptr(), dtype_of(tensor)};
}

core::Executor parallel_executor() {
  return {[](std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
            at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
              for (std::int64_t task = begin; task < end; ++task) body(task);
            });
          },
          at::get_num_threads()};
}

Tensors record(const char* name, const Tensors& inputs, const std::function<Tensors()>& forward,
               Backward backward) {
  refuse_forward_mode(name, inputs);
  LayerNode* node = nullptr;
  NodePointer owner;
  if (needs_gradient(inputs)) {
    node = new LayerNode();
    owner = own_node(node);
    node->label = std::string("fastweights::") + name + "_backward";
    node->backward = std::move(backward);
    node->set_next_edges(next_edges(inputs));
    for (const auto& input : inputs) node->inputs.emplace_back(input, /*is_output=*/false);
  }
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward();
  }();
  if (node != nullptr) {
    for (size_t i = 1; i < outputs.size(); ++i) node->kept.emplace_back(outputs[i], false);
    torch::autograd::set_history(outputs[0], owner);
  }
  return outputs;
}

}  // namespace fastweights::detail
