// Under autocast the products take what a matrix product would: everything in autocast's own dtype.
// splitting_weight is elementwise and takes what it is given, in the wider dtype of the two.

#include "common/autocast.h"
#include "splitting/dispatch.h"

#include <torch/library.h>

namespace growkernels::splitting {
namespace {

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor splitting_weight(const at::Tensor& grad, const at::Tensor& preact, c10::string_view activation,
                            std::optional<double> beta) {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  const at::ScalarType wider = at::promote_types(grad.scalar_type(), preact.scalar_type());
  return call_splitting_weight(grad.to(wider), preact.to(wider), activation, beta);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor splitting_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v) {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  return call_splitting_hvp(lowered<device>(x), lowered<device>(w), lowered<device>(v));
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor splitting_hvp_conv2d(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation) {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  return call_splitting_hvp_conv2d(lowered<device>(x), lowered<device>(w), lowered<device>(v), stride, padding,
                                   dilation);
}

template <c10::DeviceType device, c10::DispatchKey key>
void implement(torch::Library& m) {
  m.impl("splitting_weight", &splitting_weight<device, key>);
  m.impl("splitting_hvp", &splitting_hvp<device, key>);
  m.impl("splitting_hvp_conv2d", &splitting_hvp_conv2d<device, key>);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, AutocastCPU, m) { implement<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(growkernels, AutocastCUDA, m) { implement<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>(m); }

}  // namespace growkernels::splitting
