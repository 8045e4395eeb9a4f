// Derivatives, written in differentiable ops, so that they can be differentiated again. With gy the
// incoming gradient of y_i = S_i v_i, and per sample m the products p_i = x_m . v_i, q_i = x_m . gy_i:
//   gv_i = S_i gy_i        gw[m, i] = p_i q_i        gx_m = sum_i w[m, i] (q_i v_i + p_i gy_i),
// summed over the k vectors of a neuron where there are several. In the convolution, products with x are
// convolutions, and sums over i are their input gradients. Of w = g act''(z):
//   dL/dg = dL/dw act''(z)        dL/dz = dL/dw g act'''(z).

#include "common/activation_torch.h"
#include "common/autograd_node.h"
#include "splitting/splitting.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros_like.h>

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
Tensors gradients_of_x_and_w(const at::Tensor& weights_in, const at::Tensor& v_in, const at::Tensor& incoming_in,
                             const Wanted& wanted, const Map& map, const Adjoint& adjoint) {
  const at::ScalarType dtype = weights_in.scalar_type();
  const at::Tensor w = wide(weights_in), v = wide(v_in), incoming = wide(incoming_in);
  at::Tensor x_grad, w_grad;
  if (wanted(0) || wanted(1)) {
    const at::Tensor p = map(v), q = map(incoming);
    if (wanted(1)) {
      w_grad = by_neuron(p * q, w).sum(2).to(dtype);
    }
    if (wanted(0)) {
      const at::Tensor weights = w.unsqueeze(2);
      x_grad = (adjoint((by_neuron(q, w) * weights).view_symint(q.sym_sizes()), v) +
                adjoint((by_neuron(p, w) * weights).view_symint(p.sym_sizes()), incoming))
                   .to(dtype);
    }
  }
  return {x_grad, w_grad};
}

// Calls through the dispatcher.
at::Tensor call_op(const Weight& call) {
  static const auto op = registered_op<Weight::Signature>("growkernels::splitting_weight");
  return op.call(call.grad, call.preact, call.activation, call.beta);
}

at::Tensor call_op(const Hvp& call) {
  static const auto op = registered_op<Hvp::Signature>("growkernels::splitting_hvp");
  return op.call(call.x, call.w, call.v, call.full_precision);
}

at::Tensor call_op(const HvpConv2d& call) {
  static const auto op = registered_op<HvpConv2d::Signature>("growkernels::splitting_hvp_conv2d");
  return op.call(call.x, call.w, call.v, call.stride, call.padding, call.dilation);
}

at::Tensor weight(const Weight& call) {
  if (isFwGradDefined(call.grad) || isFwGradDefined(call.preact)) {
    return checked<composed_weight>(call);
  }
  const Curvature curvature = parse_curvature(call.activation, call.beta);
  return recorded(
      "SplittingWeightBackward", {call.grad, call.preact}, [&] { return call_op(call); },
      [curvature](const Tensors& inputs, const Tensors& incoming, const Wanted& wanted) -> Tensors {
        const at::Tensor &g = inputs[0], &z = inputs[1];
        const at::ScalarType dtype = z.scalar_type();
        return {wanted(0) ? (incoming[0] * second_derivative(z, curvature.activation, curvature.beta)).to(dtype)
                          : at::Tensor(),
                wanted(1) ? (incoming[0] * g * third_derivative(z, curvature.activation, curvature.beta)).to(dtype)
                          : at::Tensor()};
      });
}

at::Tensor hvp(const Hvp& call) {
  if (isFwGradDefined(call.x) || isFwGradDefined(call.w) || isFwGradDefined(call.v)) {
    return checked<composed_hvp>(call);
  }
  return recorded(
      "SplittingHvpBackward", {call.x, call.w, call.v}, [&] { return call_op(call); },
      [full_precision = call.full_precision](const Tensors& inputs, const Tensors& incoming, const Wanted& wanted) {
        const at::Tensor &rows = inputs[0], &weights = inputs[1], &vectors = inputs[2], &y_grad = incoming[0];
        const int64_t neuron_dims = vectors.dim() - 1;
        const at::Tensor wide_rows = wide(rows);
        Tensors out = gradients_of_x_and_w(
            weights, joined(vectors, neuron_dims), joined(y_grad, neuron_dims), wanted,
            [&](const at::Tensor& u) { return at::matmul(wide_rows, u.t()); },
            [](const at::Tensor& products, const at::Tensor& u) { return at::matmul(products, u); });
        out.push_back(wanted(2) ? call_op(Hvp{rows, weights, y_grad, full_precision}) : at::Tensor());
        return out;
      });
}

at::Tensor hvp_conv2d(const HvpConv2d& call) {
  if (isFwGradDefined(call.x) || isFwGradDefined(call.w) || isFwGradDefined(call.v)) {
    return checked<composed_hvp_conv2d>(call);
  }
  return recorded(
      "SplittingHvpConv2dBackward", {call.x, call.w, call.v}, [&] { return call_op(call); },
      [stride = call.stride.vec(), padding = call.padding.vec(), dilation = call.dilation.vec()](
          const Tensors& inputs, const Tensors& incoming, const Wanted& wanted) -> Tensors {
        const at::Tensor &images = inputs[0], &weights = inputs[1], &vectors = inputs[2], &y_grad = incoming[0];
        if (images.sym_numel() == 0 || vectors.sym_numel() == 0) {  // torch's convolutions refuse most of these
          return Tensors{at::zeros_like(images), at::zeros_like(weights), at::zeros_like(vectors)};
        }
        const int64_t neuron_dims = vectors.dim() - 3;
        const at::Tensor wide_images = wide(images);
        Tensors out = gradients_of_x_and_w(
            weights, joined(vectors, neuron_dims), joined(y_grad, neuron_dims), wanted,
            [&](const at::Tensor& filters) { return at::conv2d(wide_images, filters, {}, stride, padding, dilation); },
            [&](const at::Tensor& products, const at::Tensor& filters) {
              return std::get<0>(at::convolution_backward(products, wide_images, filters, std::nullopt, stride, padding,
                                                          dilation, false, {0, 0}, 1, {true, false, false}));
            });
        out.push_back(wanted(2) ? call_op(HvpConv2d{images, weights, y_grad, stride, padding, dilation})
                                : at::Tensor());
        return out;
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Autograd, m) { implement<weight, hvp, hvp_conv2d>(m); }

}  // namespace growkernels::splitting
