// What every op does to its tensors under autocast, below which the call goes on. Arguments are taken from torch's
// stack, on which Python's calls arrive in any case, so that this is written once for all signatures.

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

namespace growkernels {
namespace {

// As a matrix product would have it: autocast's own dtype. A parameter's cast is kept until the end of the autocast
// block.
template <c10::DeviceType device>
at::Tensor lowered(const at::Tensor& tensor) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

template <typename CastOne>
void cast_in_place(c10::IValue& argument, const CastOne& cast) {
  if (argument.isTensor()) {
    argument = cast(argument.toTensor());
  } else if (argument.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : argument.toTensorVector()) {
      list.push_back(cast(tensor));
    }
    argument = std::move(list);
  }
}

// Tensors that the op writes to stay as they are.
template <c10::DeviceType device, c10::DispatchKey key>
void lower_all(const c10::OperatorHandle& op, c10::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].alias_info() == nullptr) {
      cast_in_place(torch::jit::peek(*stack, i, arguments.size()), lowered<device>);
    }
  }
  op.callBoxed(stack);
}

// An elementwise op takes what it is given, in the widest dtype among its tensors.
template <c10::DispatchKey key>
void promote_all(const c10::OperatorHandle& op, c10::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  std::optional<at::ScalarType> widest;
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) {
      const at::ScalarType dtype = argument.toTensor().scalar_type();
      widest = widest.has_value() ? at::promote_types(*widest, dtype) : dtype;
    }
  }
  for (size_t i = 0; i < op.schema().arguments().size(); ++i) {
    cast_in_place(torch::jit::peek(*stack, i, op.schema().arguments().size()),
                  [&](const at::Tensor& tensor) { return tensor.to(*widest); });
  }
  op.callBoxed(stack);
}

// basis_conv2d_backward has no entry: it runs outside of autocast, on what was saved.
template <c10::DeviceType device, c10::DispatchKey key>
void implement(torch::Library& m) {
  for (const char* op : {"basis_conv2d", "basis_conv2d_with_maps", "splitting_hvp", "splitting_hvp_conv2d",
                         "virtual_grads", "virtual_grad_norms", "accumulate_virtual_grads"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&lower_all<device, key>>());
  }
  m.impl("splitting_weight", torch::CppFunction::makeFromBoxedFunction<&promote_all<key>>());
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, AutocastCPU, m) { implement<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(growkernels, AutocastCUDA, m) { implement<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>(m); }

}  // namespace growkernels
