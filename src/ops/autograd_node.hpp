#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <initializer_list>

// Autograd nodes written by hand, as PyTorch's own operators have them: torch.func refuses a
// torch::autograd::Function.

namespace fastweights::detail {

/// shared_ptr<Node> up to some version of torch, intrusive_ptr<Node> after it.
using NodePointer = decltype(torch::autograd::Edge::function);

/// Takes ownership of a node that was made with new. `Pointer` is NodePointer; a parameter, so that
/// only the branch which exists is compiled.
template <class Node, class Pointer = NodePointer>
Pointer own_node(Node* node) {
  if constexpr (requires { Pointer::reclaim(node); }) {
    return Pointer::unsafe_steal_from_new(node);
  } else {
    return Pointer(node, [](auto* owned) { deleteNode(owned); });
  }
}

/// Throws NotImplementedError if a tensor carries a forward-mode derivative, which the operators
/// have no formula for; without this it would be dropped in silence.
inline void refuse_forward_mode(const char* name, const at::Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(!input.defined() || !input._fw_grad(/*level=*/0).defined(), name,
                              ": there is no forward-mode derivative; use reverse mode");
}

template <class Tensors = std::initializer_list<at::Tensor>>
void refuse_forward_mode(const char* name, const Tensors& inputs) {
  for (const at::Tensor& input : inputs) refuse_forward_mode(name, input);
}

}  // namespace fastweights::detail
