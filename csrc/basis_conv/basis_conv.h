#pragma once
// What every implementation of the family shares. With x [N, Cin, H, W], the basis [R, Cin, kh, kw] and
// z = conv2d(x, basis), [N, R, Ho, Wo], called the maps:
//   include_basis      coeff [Cout - R, R]    y = cat(z, coeff z) + bias
//   otherwise          coeff [Cout, R]        y = coeff z + bias

#include "common/op.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
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

// The arguments of basis_conv2d and of basis_conv2d_with_maps, and how torch passes them.
struct Forward {
  template <typename Result>
  using Signature = Result(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                           c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymIntArrayRef, bool);

  const at::Tensor &x, &basis, &coeff;
  const OptionalTensor& bias;
  Form form;
};

// Of basis_conv2d_backward: `z` contains `z_bias` when that is given. Gradients that are not wanted are undefined.
struct Backward {
  using Signature = Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                              const at::Tensor&, const OptionalTensor&, c10::SymIntArrayRef, c10::SymIntArrayRef,
                              c10::SymIntArrayRef, bool, Mask);

  const at::Tensor &grad, &x, &basis, &coeff, &z;
  const OptionalTensor& z_bias;
  Form form;
  Mask wanted;
};

// y, and z beside it.
using WithMaps = std::tuple<at::Tensor, at::Tensor>;

// Throw one sentence when shapes, dtypes, devices or parameters do not fit. Work on symbolic shapes too.
void check_forward(const char* op, const Forward& call);
// basis_conv2d_with_maps exists for include_basis = false only: otherwise the maps are a part of y.
void check_with_maps(const Forward& call);
void check_backward(const Backward& call);

// kernel(call) of a call that has been checked.
template <at::Tensor (*kernel)(const Forward&)>
at::Tensor checked(const Forward& call) {
  check_forward("basis_conv2d", call);
  return kernel(call);
}
template <WithMaps (*kernel)(const Forward&)>
WithMaps checked(const Forward& call) {
  check_with_maps(call);
  return kernel(call);
}
template <Gradients (*kernel)(const Backward&)>
Gradients checked(const Backward& call) {
  check_backward(call);
  return kernel(call);
}

// Registers kernels for the three ops of this form: see ops.cpp.
template <at::Tensor (*forward)(const Forward&), WithMaps (*with_maps)(const Forward&),
          Gradients (*backward)(const Backward&)>
void implement(torch::Library& m, const std::string& form = "") {
  m.impl(("basis_conv2d" + form).c_str(), &Unpacked<Forward, Forward::Signature<at::Tensor>>::run<forward>);
  m.impl(("basis_conv2d_with_maps" + form).c_str(), &Unpacked<Forward, Forward::Signature<WithMaps>>::run<with_maps>);
  m.impl(("basis_conv2d_backward" + form).c_str(), &Unpacked<Backward>::run<backward>);
}

// [N, R, Ho, Wo] and [N, Cout, Ho, Wo].
c10::SymDimVector maps_shape(const at::Tensor& x, const at::Tensor& basis, const Form& form);
c10::SymDimVector output_shape(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff, const Form& form);

// The layout of y and of z: channels_last where x or the basis suggests it, which is what torch's own
// convolutions return. The gradients of x and of the basis take the layout that those suggest themselves,
// the other gradients are contiguous.
at::MemoryFormat output_format(const at::Tensor& x, const at::Tensor& basis);

// The vendor's forms: compositions of ATen's ops, differentiable to any order when autograd is on. Their
// results' strides are whatever ATen's ops return: see `laid_out`.
at::Tensor two_convolutions(const Forward& call);
at::Tensor reconstructed(const Forward& call);
WithMaps two_convolutions_with_maps(const Forward& call);
Gradients backward_by_two_convolutions(const Backward& call);
Gradients backward_by_reconstruction(const Backward& call);

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
