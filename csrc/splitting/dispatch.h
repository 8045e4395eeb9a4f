#pragma once
// Calls of the family's ops through the dispatcher, from kernels that wrap others.

#include "common/op.h"

#include <ATen/core/Tensor.h>

#include <optional>

namespace growkernels::splitting {

inline at::Tensor call_splitting_weight(const at::Tensor& grad, const at::Tensor& preact, c10::string_view activation,
                                        std::optional<double> beta) {
  static const auto op =
      registered_op<at::Tensor(const at::Tensor&, const at::Tensor&, c10::string_view, std::optional<double>)>(
          "growkernels::splitting_weight");
  return op.call(grad, preact, activation, beta);
}

inline at::Tensor call_splitting_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v) {
  static const auto op =
      registered_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>("growkernels::splitting_hvp");
  return op.call(x, w, v);
}

inline at::Tensor call_splitting_hvp_conv2d(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v,
                                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  static const auto op =
      registered_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef,
                               at::IntArrayRef, at::IntArrayRef)>("growkernels::splitting_hvp_conv2d");
  return op.call(x, w, v, stride, padding, dilation);
}

}  // namespace growkernels::splitting
