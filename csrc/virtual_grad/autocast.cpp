// Under autocast the ops take what a matrix product would: all positions in autocast's own dtype.

#include "virtual_grad/virtual_grad.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace growkernels::virtual_grad {
namespace {

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <c10::DeviceType device>
std::vector<at::Tensor> lowered(at::TensorList tensors) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& tensor : tensors) {
    out.push_back(at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device));
  }
  return out;
}

constexpr c10::DispatchKeySet without_autocast(c10::DispatchKey key) { return c10::DispatchKeySet(key); }

template <c10::DeviceType device, c10::DispatchKey key>
std::vector<at::Tensor> virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                      c10::string_view activation, double scale) {
  const c10::impl::ExcludeDispatchKeyGuard guard(without_autocast(key));
  using Signature = std::vector<at::Tensor>(at::TensorList, at::TensorList, c10::string_view, c10::string_view, double);
  static const auto below = op<Signature>("growkernels::virtual_grads");
  return below.call(lowered<device>(inputs), lowered<device>(grads), layer, activation, scale);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor virtual_grad_norms(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                              c10::string_view activation, double scale) {
  const c10::impl::ExcludeDispatchKeyGuard guard(without_autocast(key));
  using Signature = at::Tensor(at::TensorList, at::TensorList, c10::string_view, c10::string_view, double);
  static const auto below = op<Signature>("growkernels::virtual_grad_norms");
  return below.call(lowered<device>(inputs), lowered<device>(grads), layer, activation, scale);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor accumulate_virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                    c10::string_view activation, double scale, at::TensorList sums,
                                    const std::optional<at::Tensor>& second_moments) {
  const c10::impl::ExcludeDispatchKeyGuard guard(without_autocast(key));
  using Signature = at::Tensor(at::TensorList, at::TensorList, c10::string_view, c10::string_view, double,
                               at::TensorList, const std::optional<at::Tensor>&);
  static const auto below = op<Signature>("growkernels::accumulate_virtual_grads");
  return below.call(lowered<device>(inputs), lowered<device>(grads), layer, activation, scale, sums, second_moments);
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
