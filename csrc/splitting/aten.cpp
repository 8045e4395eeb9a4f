// The family composed of ATen's ops, for devices without kernels of their own. The products of rows and
// vectors are written to memory here.

#include "common/activation_torch.h"
#include "common/kernels_ran.h"
#include "splitting/splitting.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

namespace growkernels::splitting {

at::Tensor composed_weight(const Weight& call, const Curvature& curvature) {
  note(Ran::Aten);
  return at::empty_like(call.preact)
      .copy_(call.grad * second_derivative(call.preact, curvature.activation, curvature.beta));
}

at::Tensor composed_hvp(const Hvp& call) {
  note(Ran::Aten);
  const at::Tensor &x = call.x, &w = call.w, &v = call.v;
  const int64_t rows = x.size(0), neurons = v.size(0), k = v.dim() == 2 ? 1 : v.size(1);
  const at::Tensor samples = wide(x), vectors = wide(v.dim() == 2 ? v : v.flatten(0, 1));
  const at::Tensor products = at::mm(samples, vectors.t());
  const at::Tensor weighted = (products.view({rows, neurons, k}) * wide(w).unsqueeze(2)).view({rows, neurons * k});
  return at::mm(weighted.t(), samples).view(v.sizes()).to(v.scalar_type());
}

at::Tensor composed_hvp_conv2d(const HvpConv2d& call, const Sliding&) {
  note(Ran::Aten);
  const auto& [x, w, v, stride, padding, dilation] = call;
  const at::Tensor images = wide(x), filters = wide(v.dim() == 4 ? v : v.flatten(0, 1));
  const at::Tensor products = at::conv2d(images, filters, {}, stride, padding, dilation);
  const at::Tensor weights = wide(v.dim() == 4 ? w : w.repeat_interleave(v.size(1), 1));
  const auto [x_grad, filter_grad, bias_grad] =
      at::convolution_backward(products * weights, images, filters, std::nullopt, stride, padding, dilation, false,
                               {0, 0}, 1, {false, true, false});
  return filter_grad.contiguous().view(v.sizes()).to(v.scalar_type());
}

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  for (const char* form : {"", "_composed"}) {
    implement<checked<composed_weight>, checked<composed_hvp>, checked<composed_hvp_conv2d>>(m, form);
  }
}

}  // namespace growkernels::splitting
