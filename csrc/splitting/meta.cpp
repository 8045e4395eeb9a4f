// Shapes and dtypes without data, for fake tensors, torch.compile and torch.export; on other devices the memory of the
// results, for kernels that are launched from Python.

#include "splitting/splitting.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace growkernels::splitting {
namespace {

at::Tensor splitting_weight(const at::Tensor& grad, const at::Tensor& preact, c10::string_view activation,
                            std::optional<double> beta) {
  parse_activation(activation, beta);
  check_weight(grad, preact);
  return at::empty_like(preact);
}

at::Tensor splitting_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v) {
  check_hvp(x, w, v);
  return at::empty_symint(v.sym_sizes(), v.options());
}

at::Tensor splitting_hvp_conv2d(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_hvp_conv2d(x, w, v, parse_sliding(stride, padding, dilation));
  return at::empty_symint(v.sym_sizes(), v.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Meta, m) {
  m.impl("splitting_weight", &splitting_weight);
  m.impl("splitting_hvp", &splitting_hvp);
  m.impl("splitting_hvp_conv2d", &splitting_hvp_conv2d);
}
TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  m.impl("splitting_weight_outputs", &splitting_weight);
  m.impl("splitting_hvp_outputs", &splitting_hvp);
  m.impl("splitting_hvp_conv2d_outputs", &splitting_hvp_conv2d);
}

}  // namespace growkernels::splitting
