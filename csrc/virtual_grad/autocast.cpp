// Under autocast the ops take what a matrix product would: all positions in autocast's own dtype.

#include "common/autocast.h"
#include "virtual_grad/dispatch.h"

#include <torch/library.h>

namespace growkernels::virtual_grad {
namespace {

template <c10::DeviceType device>
std::vector<at::Tensor> all_lowered(at::TensorList tensors) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& tensor : tensors) {
    out.push_back(lowered<device>(tensor));
  }
  return out;
}

template <c10::DeviceType device, c10::DispatchKey key>
std::vector<at::Tensor> virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                      c10::string_view activation, double scale) {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  return call_virtual_grads(all_lowered<device>(inputs), all_lowered<device>(grads), layer, activation, scale);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor virtual_grad_norms(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                              c10::string_view activation, double scale) {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  return call_virtual_grad_norms(all_lowered<device>(inputs), all_lowered<device>(grads), layer, activation, scale);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor accumulate_virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                    c10::string_view activation, double scale, at::TensorList sums,
                                    const std::optional<at::Tensor>& second_moments) {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  return call_accumulate_virtual_grads(all_lowered<device>(inputs), all_lowered<device>(grads), layer, activation,
                                       scale, sums, second_moments);
}

template <c10::DeviceType device, c10::DispatchKey key>
void implement(torch::Library& m) {
  m.impl("virtual_grads", &virtual_grads<device, key>);
  m.impl("virtual_grad_norms", &virtual_grad_norms<device, key>);
  m.impl("accumulate_virtual_grads", &accumulate_virtual_grads<device, key>);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, AutocastCPU, m) { implement<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(growkernels, AutocastCUDA, m) { implement<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>(m); }

}  // namespace growkernels::virtual_grad
