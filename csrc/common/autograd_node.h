#pragma once
// Nodes of the autograd graph that also work under torch.func (grad, vjp, per-sample gradients), which
// refuses torch::autograd::Function in C++.

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>

namespace growkernels {

// Older versions of torch hold nodes by std::shared_ptr, newer ones by c10::intrusive_ptr.
using NodePointer = decltype(torch::autograd::Edge::function);

// A new node, and the same once more as the pointer that graph edges take.
template <typename T>
struct NewNode {
  T* node;
  NodePointer pointer;
};

template <typename T>
NewNode<T> make_node(torch::autograd::edge_list&& next_edges) {
  T* node = nullptr;
  NodePointer pointer;
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>) {
    node = new T();
    // torch::autograd::deleteNode, which newer versions no longer have.
    pointer = NodePointer(node, [](auto* old) { deleteNode(old); });
  } else {
    auto made = c10::make_intrusive<T>();
    node = made.get();
    pointer = std::move(made);
  }
  node->set_next_edges(std::move(next_edges));
  return {node, std::move(pointer)};
}

}  // namespace growkernels
