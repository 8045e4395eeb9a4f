// The family composed of ATen's ops, for devices without kernels of their own. The products of rows and
// vectors are written to memory here.

#include "common/kernels_ran.h"
#include "splitting/splitting.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <string>

namespace growkernels::splitting {

at::Tensor composed_weight(const at::Tensor& grad, const at::Tensor& preact, c10::string_view activation,
                           std::optional<double> beta) {
  const Curvature curvature = parse_activation(activation, beta);
  check_weight(grad, preact);
  note(Ran::Aten);
  return at::empty_like(preact).copy_(grad * second_derivative(preact, curvature));
}

at::Tensor composed_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v) {
  check_hvp(x, w, v);
  note(Ran::Aten);
  const int64_t rows = x.size(0), neurons = v.size(0), k = v.dim() == 2 ? 1 : v.size(1);
  const at::Tensor vectors = v.dim() == 2 ? v : v.flatten(0, 1);
  const at::Tensor products = at::mm(x, vectors.t());
  const at::Tensor weighted = (products.view({rows, neurons, k}) * w.unsqueeze(2)).view({rows, neurons * k});
  return at::mm(weighted.t(), x).view(v.sizes());
}

at::Tensor composed_hvp_conv2d(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_hvp_conv2d(x, w, v, parse_sliding(stride, padding, dilation));
  note(Ran::Aten);
  const at::Tensor filters = v.dim() == 4 ? v : v.flatten(0, 1);
  const at::Tensor products = at::conv2d(x, filters, {}, stride, padding, dilation);
  const at::Tensor weights = v.dim() == 4 ? w : w.repeat_interleave(v.size(1), 1);
  const auto [x_grad, filter_grad, bias_grad] = at::convolution_backward(
      products * weights, x, filters, std::nullopt, stride, padding, dilation, false, {0, 0}, 1, {false, true, false});
  return filter_grad.contiguous().view(v.sizes());
}

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  for (const std::string form : {"", "_composed"}) {
    m.impl(("splitting_weight" + form).c_str(), &composed_weight);
    m.impl(("splitting_hvp" + form).c_str(), &composed_hvp);
    m.impl(("splitting_hvp_conv2d" + form).c_str(), &composed_hvp_conv2d);
  }
}

}  // namespace growkernels::splitting
