#pragma once
// Nodes of the autograd graph that also work under torch.func (grad, vjp, per-sample gradients), which
// refuses torch::autograd::Function in C++.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
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

// A call whose gradients follow from its inputs alone.
struct CallNode final : torch::autograd::Node {
  using Tensors = torch::autograd::variable_list;
  using Wanted = std::function<bool(size_t input)>;
  // The gradients of the inputs from those of the outputs; those that are not wanted may be undefined.
  using Backward = std::function<Tensors(const Tensors& inputs, const Tensors& incoming, const Wanted& wanted)>;

  std::string label;
  std::vector<torch::autograd::SavedVariable> saved;
  Backward backward;

  std::string name() const override { return label; }

  Tensors apply(Tensors&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto defined = [](const at::Tensor& gradient) { return gradient.defined(); };
    if (std::none_of(incoming.begin(), incoming.end(), defined)) {
      return Tensors(saved.size());
    }
    Tensors inputs;
    for (const torch::autograd::SavedVariable& variable : saved) {
      inputs.push_back(variable.unpack());
    }
    return backward(inputs, incoming, [this](size_t input) { return task_should_compute_output(input); });
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (torch::autograd::SavedVariable& variable : saved) {
      variable.reset_data();
    }
  }
};

// call() of the op below autograd, recorded in the graph where an input requires it.
template <typename Call>
auto recorded(const char* name, const CallNode::Tensors& inputs, const Call& call, CallNode::Backward backward) {
  const bool differentiable = torch::autograd::compute_requires_grad(at::TensorList(inputs));
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call();
  }();
  if (differentiable) {
    const auto [node, pointer] = make_node<CallNode>(torch::autograd::collect_next_edges(at::TensorList(inputs)));
    node->label = name;
    node->backward = std::move(backward);
    for (const at::Tensor& input : inputs) {
      node->saved.emplace_back(input, false);
    }
    torch::autograd::set_history(outputs, pointer);
  }
  return outputs;
}

}  // namespace growkernels
