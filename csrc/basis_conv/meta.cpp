// Shapes, dtypes and strides without data, for fake tensors, torch.compile and torch.export; on other devices the
// memory of the results, for kernels that are launched from Python.

#include "basis_conv/basis_conv.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace growkernels::basis_conv {
namespace {

at::Tensor empty_output(const at::Tensor& x, const at::Tensor& basis, c10::SymIntArrayRef shape) {
  return at::empty_symint(shape, x.options(), output_format(x, basis));
}

at::Tensor basis_conv2d(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                        const OptionalTensor& bias, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                        c10::SymIntArrayRef dilation, bool include_basis) {
  const Form form{stride, padding, dilation, include_basis};
  check_forward("basis_conv2d", x, basis, coeff, bias, form);
  return empty_output(x, basis, output_shape(x, basis, coeff, form));
}

std::tuple<at::Tensor, at::Tensor> basis_conv2d_with_maps(const at::Tensor& x, const at::Tensor& basis,
                                                          const at::Tensor& coeff, const OptionalTensor& bias,
                                                          c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                          c10::SymIntArrayRef dilation, bool include_basis) {
  const Form form{stride, padding, dilation, include_basis};
  check_with_maps(x, basis, coeff, bias, form);
  return {empty_output(x, basis, output_shape(x, basis, coeff, form)),
          empty_output(x, basis, maps_shape(x, basis, form))};
}

Gradients basis_conv2d_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& basis,
                                const at::Tensor& coeff, const at::Tensor& z, const OptionalTensor& z_bias,
                                c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                bool include_basis, Mask output_mask) {
  check_backward(grad, x, basis, coeff, z, z_bias, {stride, padding, dilation, include_basis});
  const auto empty = [&](bool wanted, c10::SymIntArrayRef shape, at::MemoryFormat format) {
    return wanted ? at::empty_symint(shape, x.options(), format) : at::Tensor();
  };
  const std::array<c10::SymInt, 1> channels = {grad.sym_size(1)};
  return {empty(output_mask[0], x.sym_sizes(), x.suggest_memory_format()),
          empty(output_mask[1], basis.sym_sizes(), basis.suggest_memory_format()),
          empty(output_mask[2], coeff.sym_sizes(), at::MemoryFormat::Contiguous),
          empty(output_mask[3], channels, at::MemoryFormat::Contiguous)};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Meta, m) {
  m.impl("basis_conv2d", &basis_conv2d);
  m.impl("basis_conv2d_with_maps", &basis_conv2d_with_maps);
  m.impl("basis_conv2d_backward", &basis_conv2d_backward);
}
TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  m.impl("basis_conv2d_outputs", &basis_conv2d);
  m.impl("basis_conv2d_with_maps_outputs", &basis_conv2d_with_maps);
  m.impl("basis_conv2d_backward_outputs", &basis_conv2d_backward);
}

}  // namespace growkernels::basis_conv
