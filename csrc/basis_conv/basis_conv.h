#pragma once
// What every implementation of the family shares. With x [N, Cin, H, W], the basis [R, Cin, kh, kw] and
// z = conv2d(x, basis), [N, R, Ho, Wo], called the maps:
//   include_basis      coeff [Cout - R, R]    y = cat(z, coeff z) + bias
//   otherwise          coeff [Cout, R]        y = coeff z + bias

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace growkernels::basis_conv {

// The parameters of a call that are not tensors; [vertical, horizontal] each.
struct Form {
  c10::SymIntArrayRef stride, padding, dilation;
  bool include_basis;
};

using OptionalTensor = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // of x, basis, coeff and bias
using Mask = std::array<bool, 4>;                                              // which of them are wanted

// The registered ops' signatures.
using ForwardSignature = at::Tensor(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                                    const OptionalTensor& bias, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                    c10::SymIntArrayRef dilation, bool include_basis);
using WithMapsSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& x, const at::Tensor& basis,
                                                             const at::Tensor& coeff, const OptionalTensor& bias,
                                                             c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                             c10::SymIntArrayRef dilation, bool include_basis);
using BackwardSignature = Gradients(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& basis,
                                    const at::Tensor& coeff, const at::Tensor& z, const OptionalTensor& z_bias,
                                    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                    c10::SymIntArrayRef dilation, bool include_basis, Mask output_mask);

// Throw one sentence when shapes, dtypes, devices or parameters do not fit. Work on symbolic shapes too.
void check_forward(const char* op, const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                   const OptionalTensor& bias, const Form& form);
// basis_conv2d_with_maps exists for include_basis = false only: otherwise the maps are a part of y.
void check_with_maps(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff, const OptionalTensor& bias,
                     const Form& form);
void check_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                    const at::Tensor& z, const OptionalTensor& z_bias, const Form& form);

// [N, R, Ho, Wo] and [N, Cout, Ho, Wo].
c10::SymDimVector maps_shape(const at::Tensor& x, const at::Tensor& basis, const Form& form);
c10::SymDimVector output_shape(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff, const Form& form);

// The layout of y and of z: channels_last where x or the basis suggests it, which is what torch's own
// convolutions return. The gradients of x and of the basis take the layout that those suggest themselves,
// the other gradients are contiguous.
at::MemoryFormat output_format(const at::Tensor& x, const at::Tensor& basis);

// The vendor's forms: compositions of ATen's ops, differentiable to any order when autograd is on. Their
// results' strides are whatever ATen's ops return: see `laid_out`.
at::Tensor two_convolutions(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                            const OptionalTensor& bias, const Form& form);
at::Tensor reconstructed(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                         const OptionalTensor& bias, const Form& form);
std::tuple<at::Tensor, at::Tensor> two_convolutions_with_maps(const at::Tensor& x, const at::Tensor& basis,
                                                              const at::Tensor& coeff, const OptionalTensor& bias,
                                                              const Form& form);
// `z` contains `z_bias` when that is given. Gradients that are not wanted are undefined tensors.
Gradients backward_by_two_convolutions(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& basis,
                                       const at::Tensor& coeff, const at::Tensor& z, const OptionalTensor& z_bias,
                                       const Form& form, Mask wanted);
Gradients backward_by_reconstruction(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& basis,
                                     const at::Tensor& coeff, const Form& form, Mask wanted);

// Their parts: coeff applied to maps, its transpose applied to gradients, sum over n, h, w of a b', and
// the gradient of the maps.
at::Tensor mix(const at::Tensor& coeff, const at::Tensor& maps);
at::Tensor channel_products(const at::Tensor& a, const at::Tensor& b);
at::Tensor maps_gradient(const at::Tensor& grad, const at::Tensor& coeff, const Form& form);
// The channels of y, or of its gradient, that are mixed out of the maps.
at::Tensor mixed_channels(const at::Tensor& y, const at::Tensor& coeff);

// The tensor itself where its strides are those of a fresh tensor of that format, else a copy.
at::Tensor laid_out(const at::Tensor& tensor, at::MemoryFormat format);
Gradients laid_out(const Gradients& gradients, const at::Tensor& x, const at::Tensor& basis);

}  // namespace growkernels::basis_conv
