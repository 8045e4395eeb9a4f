// Under autocast the ops take what a convolution would: autocast's own dtype. The backward op runs
// outside, on what was saved.

#include "common/autocast.h"
#include "basis_conv/basis_conv.h"
#include "common/registered_op.h"

#include <torch/library.h>

namespace growkernels::basis_conv {
namespace {

template <c10::DeviceType device>
OptionalTensor lowered_if_given(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(lowered<device>(*tensor)) : std::nullopt;
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor basis_conv2d(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                        const OptionalTensor& bias, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                        c10::SymIntArrayRef dilation, bool include_basis) {
  static const auto below = registered_op<ForwardSignature>("growkernels::basis_conv2d");
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  return below.call(lowered<device>(x), lowered<device>(basis), lowered<device>(coeff), lowered_if_given<device>(bias),
                    stride, padding, dilation, include_basis);
}

template <c10::DeviceType device, c10::DispatchKey key>
std::tuple<at::Tensor, at::Tensor> basis_conv2d_with_maps(const at::Tensor& x, const at::Tensor& basis,
                                                          const at::Tensor& coeff, const OptionalTensor& bias,
                                                          c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                          c10::SymIntArrayRef dilation, bool include_basis) {
  static const auto below = registered_op<WithMapsSignature>("growkernels::basis_conv2d_with_maps");
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(key)};
  return below.call(lowered<device>(x), lowered<device>(basis), lowered<device>(coeff), lowered_if_given<device>(bias),
                    stride, padding, dilation, include_basis);
}

template <c10::DeviceType device, c10::DispatchKey key>
void implement(torch::Library& m) {
  m.impl("basis_conv2d", &basis_conv2d<device, key>);
  m.impl("basis_conv2d_with_maps", &basis_conv2d_with_maps<device, key>);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, AutocastCPU, m) { implement<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(growkernels, AutocastCUDA, m) { implement<c10::DeviceType::CUDA, c10::DispatchKey::Autocast>(m); }

}  // namespace growkernels::basis_conv
