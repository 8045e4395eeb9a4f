// Derivatives, written in differentiable ops, so that they can be differentiated again. With gy the
// incoming gradient of y_i = S_i v_i, and per sample m the products p_i = x_m . v_i, q_i = x_m . gy_i:
//   gv_i = S_i gy_i        gw[m, i] = p_i q_i        gx_m = sum_i w[m, i] (q_i v_i + p_i gy_i),
// summed over the k vectors of a neuron where there are several. In the convolution, products with x are
// convolutions, and sums over i are their input gradients. Of w = g act''(z):
//   dL/dg = dL/dw act''(z)        dL/dz = dL/dw g act'''(z).

#include "common/autograd_node.h"
#include "splitting/dispatch.h"
#include "splitting/splitting.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

namespace growkernels::splitting {
namespace {

using torch::autograd::isFwGradDefined;
using Tensors = CallNode::Tensors;
using Wanted = CallNode::Wanted;

// [n, d] or [n, k, d] -> [n k, d]; the same for filters.
at::Tensor joined(const at::Tensor& v, int64_t neuron_dims) { return neuron_dims == 1 ? v : v.flatten(0, 1); }

// [M, n k] -> [M, n, k] or [N, n k, H, W] -> [N, n, k, H, W].
at::Tensor by_neuron(const at::Tensor& products, const at::Tensor& w) {
  c10::SymDimVector sizes(w.sym_sizes().begin(), w.sym_sizes().end());
  const c10::SymInt neurons = sizes[1], k = neurons == 0 ? c10::SymInt(1) : products.sym_size(1) / neurons;
  sizes.insert(sizes.begin() + 2, k);
  return products.view_symint(sizes);
}

// What the two products have in common; Map applies vectors to x, and Adjoint maps products back to x.
template <typename Map, typename Adjoint>
Tensors gradients_of_x_and_w(const at::Tensor& w, const at::Tensor& v, const at::Tensor& incoming, const Wanted& wanted,
                             const Map& map, const Adjoint& adjoint) {
  at::Tensor x_grad, w_grad;
  if (wanted(0) || wanted(1)) {
    const at::Tensor p = map(v), q = map(incoming);
    if (wanted(1)) {
      w_grad = by_neuron(p * q, w).sum(2);
    }
    if (wanted(0)) {
      const at::Tensor weights = w.unsqueeze(2);
      x_grad = adjoint((by_neuron(q, w) * weights).view_symint(q.sym_sizes()), v) +
               adjoint((by_neuron(p, w) * weights).view_symint(p.sym_sizes()), incoming);
    }
  }
  return {x_grad, w_grad};
}

at::Tensor splitting_weight(const at::Tensor& grad, const at::Tensor& preact, c10::string_view activation,
                            std::optional<double> beta) {
  if (isFwGradDefined(grad) || isFwGradDefined(preact)) {
    return composed_weight(grad, preact, activation, beta);
  }
  const Curvature curvature = parse_activation(activation, beta);
  return recorded(
      "SplittingWeightBackward", {grad, preact}, [&] { return call_splitting_weight(grad, preact, activation, beta); },
      [curvature](const Tensors& inputs, const Tensors& incoming, const Wanted& wanted) -> Tensors {
        const at::Tensor &g = inputs[0], &z = inputs[1];
        const at::ScalarType dtype = z.scalar_type();
        return {wanted(0) ? (incoming[0] * second_derivative(z, curvature)).to(dtype) : at::Tensor(),
                wanted(1) ? (incoming[0] * g * third_derivative(z, curvature)).to(dtype) : at::Tensor()};
      });
}

at::Tensor splitting_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v) {
  if (isFwGradDefined(x) || isFwGradDefined(w) || isFwGradDefined(v)) {
    return composed_hvp(x, w, v);
  }
  return recorded(
      "SplittingHvpBackward", {x, w, v}, [&] { return call_splitting_hvp(x, w, v); },
      [](const Tensors& inputs, const Tensors& incoming, const Wanted& wanted) {
        const at::Tensor &rows = inputs[0], &weights = inputs[1], &vectors = inputs[2], &y_grad = incoming[0];
        const int64_t neuron_dims = vectors.dim() - 1;
        Tensors out = gradients_of_x_and_w(
            weights, joined(vectors, neuron_dims), joined(y_grad, neuron_dims), wanted,
            [&](const at::Tensor& u) { return at::matmul(rows, u.t()); },
            [](const at::Tensor& products, const at::Tensor& u) { return at::matmul(products, u); });
        out.push_back(wanted(2) ? call_splitting_hvp(rows, weights, y_grad) : at::Tensor());
        return out;
      });
}

at::Tensor splitting_hvp_conv2d(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation) {
  if (isFwGradDefined(x) || isFwGradDefined(w) || isFwGradDefined(v)) {
    return composed_hvp_conv2d(x, w, v, stride, padding, dilation);
  }
  return recorded(
      "SplittingHvpConv2dBackward", {x, w, v},
      [&] { return call_splitting_hvp_conv2d(x, w, v, stride, padding, dilation); },
      [stride = stride.vec(), padding = padding.vec(), dilation = dilation.vec()](
          const Tensors& inputs, const Tensors& incoming, const Wanted& wanted) {
        const at::Tensor &images = inputs[0], &weights = inputs[1], &vectors = inputs[2], &y_grad = incoming[0];
        const int64_t neuron_dims = vectors.dim() - 3;
        Tensors out = gradients_of_x_and_w(
            weights, joined(vectors, neuron_dims), joined(y_grad, neuron_dims), wanted,
            [&](const at::Tensor& filters) { return at::conv2d(images, filters, {}, stride, padding, dilation); },
            [&](const at::Tensor& products, const at::Tensor& filters) {
              return std::get<0>(at::convolution_backward(products, images, filters, std::nullopt, stride, padding,
                                                          dilation, false, {0, 0}, 1, {true, false, false}));
            });
        out.push_back(wanted(2) ? call_splitting_hvp_conv2d(images, weights, y_grad, stride, padding, dilation)
                                : at::Tensor());
        return out;
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Autograd, m) {
  m.impl("splitting_weight", &splitting_weight);
  m.impl("splitting_hvp", &splitting_hvp);
  m.impl("splitting_hvp_conv2d", &splitting_hvp_conv2d);
}

}  // namespace growkernels::splitting
