// The family composed of ATen's ops: for devices without a kernel of their own, and for the CPU where the
// vendor's convolutions win.

#include "basis_conv/basis_conv.h"
#include "basis_conv/plan.h"
#include "common/kernels_ran.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

namespace growkernels::basis_conv {
namespace {

at::Tensor as_kernel(const at::Tensor& matrix) { return matrix.unsqueeze(-1).unsqueeze(-1); }

// oneDNN crashes where it should write the bias alone, as a dilated kernel meets no column of a narrow image.
at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const Form& form) {
  const bool apart = bias.has_value() && (form.dilation[0] != 1 || form.dilation[1] != 1);
  const OptionalTensor given = apart ? std::nullopt : bias;
  const at::Tensor y = at::conv2d_symint(x, weight, given, form.stride, form.padding, form.dilation);
  return apart ? y + bias->view({-1, 1, 1}) : y;
}

using ConvolutionGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ConvolutionGradients convolution_gradients(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                           const Form& form, std::array<bool, 3> wanted) {
  const std::array<c10::SymInt, 1> bias_size = {weight.sym_size(0)};
  const std::array<c10::SymInt, 2> no_output_padding = {0, 0};
  return at::convolution_backward_symint(grad, x, weight, at::OptionalSymIntArrayRef(bias_size), form.stride,
                                         form.padding, form.dilation, false, no_output_padding, 1, wanted);
}

at::Tensor full_kernel(const at::Tensor& basis, const at::Tensor& coeff, bool include_basis) {
  c10::SymDimVector shape(basis.sym_sizes());
  shape[0] = coeff.sym_size(0);
  const at::Tensor mixed = at::mm(coeff, basis.flatten(1)).view_symint(shape);
  return include_basis ? at::cat({basis, mixed}) : mixed;
}

at::Tensor bias_gradient(const at::Tensor& grad, bool wanted) { return wanted ? grad.sum({0, 2, 3}) : at::Tensor(); }

}  // namespace

// oneDNN reads what lies between the rows of a kernel in bfloat16.
at::Tensor mix(const at::Tensor& coeff, const at::Tensor& maps) {
  return at::conv2d(maps, as_kernel(coeff.contiguous()));
}

at::Tensor channel_products(const at::Tensor& a, const at::Tensor& b) {
  const c10::SymInt rows = a.sym_size(1), columns = b.sym_size(1);
  if (rows == 0) {
    return at::zeros_symint({rows, columns}, a.options());
  }
  const at::Tensor weight = at::zeros_symint({rows, columns, 1, 1}, a.options());
  const std::array<c10::SymInt, 2> one = {1, 1}, zero = {0, 0};
  const auto gradients = convolution_gradients(a, b, weight, {one, zero, one, false}, {false, true, false});
  return std::get<1>(gradients).flatten(1);
}

at::Tensor mixed_channels(const at::Tensor& y, const at::Tensor& coeff) {
  return y.narrow_symint(1, y.sym_size(1) - coeff.sym_size(0), coeff.sym_size(0));
}

at::Tensor maps_gradient(const at::Tensor& grad, const at::Tensor& coeff, const Form& form) {
  if (!form.include_basis) {
    return mix(coeff.t(), grad);
  }
  const at::Tensor direct = grad.narrow_symint(1, 0, coeff.sym_size(1));
  if (coeff.sym_size(0) == 0) {
    return direct;
  }
  at::Tensor through_mix = mix(coeff.t(), mixed_channels(grad, coeff));
  return at::GradMode::is_enabled() ? through_mix + direct : through_mix.add_(direct);
}

at::Tensor two_convolutions(const Forward& call) {
  note(Ran::TwoConvolutions);
  const auto& [x, basis, coeff, bias, form] = call;
  if (!form.include_basis) {
    return std::get<0>(two_convolutions_with_maps(call));
  }
  const at::Tensor z = convolution(x, basis, std::nullopt, form);
  const at::Tensor y = coeff.sym_size(0) == 0 ? z : at::cat({z, mix(coeff, z)}, 1);
  return bias.has_value() ? y + as_kernel(*bias) : y;
}

WithMaps two_convolutions_with_maps(const Forward& call) {
  note(Ran::TwoConvolutions);
  const auto& [x, basis, coeff, bias, form] = call;
  const at::Tensor z = convolution(x, basis, std::nullopt, form);
  const at::Tensor y = mix(coeff, z);
  // Not the convolution's own bias: torch.func cannot differentiate that in batches of directions.
  return {bias.has_value() ? y + as_kernel(*bias) : y, z};
}

at::Tensor reconstructed(const Forward& call) {
  note(Ran::Reconstruct);
  return convolution(call.x, full_kernel(call.basis, call.coeff, call.form.include_basis), call.bias, call.form);
}

Gradients backward_by_two_convolutions(const Backward& call) {
  note(Ran::TwoConvolutions);
  const auto& [grad, x, basis, coeff, z, z_bias, form, wanted] = call;
  at::Tensor dx, dbasis, dcoeff, unused;
  if (wanted[2]) {  // first: its copies of the operands are gone before dx needs memory
    const at::Tensor maps = z_bias.has_value() ? z - as_kernel(*z_bias) : z;
    dcoeff = channel_products(mixed_channels(grad, coeff), maps);
  }
  if (wanted[0] || wanted[1]) {
    const at::Tensor dz = maps_gradient(grad, coeff, form);
    std::tie(dx, dbasis, unused) = convolution_gradients(dz, x, basis, form, {wanted[0], wanted[1], false});
  }
  return {dx, dbasis, dcoeff, bias_gradient(grad, wanted[3])};
}

Gradients backward_by_reconstruction(const Backward& call) {
  note(Ran::Reconstruct);
  const auto& [grad, x, basis, coeff, z, z_bias, form, wanted] = call;
  const at::Tensor kernel = full_kernel(basis, coeff, form.include_basis);
  const bool kernel_wanted = wanted[1] || wanted[2];
  const auto [dx, dkernel, dbias] = convolution_gradients(grad, x, kernel, form, {wanted[0], kernel_wanted, wanted[3]});
  at::Tensor dbasis, dcoeff;
  if (kernel_wanted) {
    const at::Tensor rows = dkernel.flatten(1);
    const at::Tensor mixed = rows.narrow_symint(0, rows.sym_size(0) - coeff.sym_size(0), coeff.sym_size(0));
    if (wanted[1]) {
      const at::Tensor through_mix = at::mm(coeff.t(), mixed);
      const at::Tensor sum =
          form.include_basis ? rows.narrow_symint(0, 0, coeff.sym_size(1)) + through_mix : through_mix;
      dbasis = sum.view_symint(basis.sym_sizes());
    }
    if (wanted[2]) {
      dcoeff = at::mm(mixed, basis.flatten(1).t());
    }
  }
  return {dx, dbasis, dcoeff, dbias};
}

at::Tensor laid_out(const at::Tensor& tensor, at::MemoryFormat format) {
  const at::Tensor fresh = at::empty(tensor.sizes(), tensor.options().device(at::kMeta).memory_format(format));
  if (tensor.strides() == fresh.strides()) {
    return tensor;
  }
  // Strides of dimensions of size 1 may differ although the elements lie in the right order.
  return tensor.is_contiguous(format) ? tensor.as_strided(tensor.sizes(), fresh.strides())
                                      : at::empty_like(tensor, format).copy_(tensor);
}

Gradients laid_out(const Gradients& gradients, const at::Tensor& x, const at::Tensor& basis) {
  const auto arranged = [](const at::Tensor& gradient, at::MemoryFormat format) {
    return gradient.defined() ? laid_out(gradient, format) : gradient;
  };
  const auto& [dx, dbasis, dcoeff, dbias] = gradients;
  return {arranged(dx, x.suggest_memory_format()), arranged(dbasis, basis.suggest_memory_format()),
          arranged(dcoeff, at::MemoryFormat::Contiguous), arranged(dbias, at::MemoryFormat::Contiguous)};
}

namespace {

at::Tensor forward(const Forward& call) {
  const bool reconstruct = composed_algorithm(call.x, call.basis, call.coeff, call.form) == Algorithm::Reconstruct;
  return laid_out(reconstruct ? reconstructed(call) : two_convolutions(call), output_format(call.x, call.basis));
}

WithMaps with_maps(const Forward& call) {
  const auto [y, z] = two_convolutions_with_maps(call);
  const at::MemoryFormat format = output_format(call.x, call.basis);
  return {laid_out(y, format), laid_out(z, format)};
}

Gradients backward(const Backward& call) {
  const bool reconstruct = composed_algorithm(call.x, call.basis, call.coeff, call.form) == Algorithm::Reconstruct;
  return laid_out(reconstruct ? backward_by_reconstruction(call) : backward_by_two_convolutions(call), call.x,
                  call.basis);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  for (const char* form : {"", "_composed"}) {
    implement<checked<forward>, checked<with_maps>, checked<backward>>(m, form);
  }
}

}  // namespace growkernels::basis_conv
