// Derivatives of G and of its norms with respect to the inputs h and the gradients g, written in
// differentiable ATen ops, so that they can be differentiated again. With dG the incoming gradient:
//   linear_relu  G = (g * [h>0])' h          dg = [h>0] * (h dG')          dh = (g * [h>0]) dG
//   residual     G = g' sigma(s h)           dg = sigma(s h) dG'           dh = d/dh sigma(s h) * (g dG)
//   conv2d_relu  G = wgrad(h, g * [h>0])     dg = [h>0] * conv(h, dG)      dh = conv^T(g * [h>0], dG)
//   linear       G = g' h                    dg = h dG'                    dh = g dG
// The mask [h>0] is constant almost everywhere and contributes nothing.

#include "common/activation_torch.h"
#include "common/autograd_node.h"
#include "common/whole_rows.h"
#include "virtual_grad/virtual_grad.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros_like.h>

namespace growkernels::virtual_grad {
namespace {

using torch::autograd::isFwGradDefinedTensorList;
using Tensors = CallNode::Tensors;

struct PositionGradients {
  at::Tensor input, grad;
};

PositionGradients backward_at(const at::Tensor& input, const at::Tensor& grad, const at::Tensor& incoming,
                              const Kind& kind) {
  const at::Tensor h = whole_rows(input), g = whole_rows(grad), dG = whole_rows(incoming.to(h.scalar_type()));
  if (kind.layer == Layer::Residual) {
    const at::Tensor slope = kind.scale * first_derivative(h * kind.scale, kind.activation);
    return {slope * at::matmul(g, dG), at::matmul(activate(h, kind), dG.t())};
  }
  if (kind.layer == Layer::Linear) {
    return {at::matmul(g, dG), at::matmul(h, dG.t())};
  }
  if (h.sym_numel() == 0) {  // convolutions refuse it
    return {at::zeros_like(h), at::zeros_like(g)};
  }
  const at::Tensor mask = first_derivative(h, Activation::Relu);
  if (kind.layer == Layer::LinearRelu) {
    return {at::matmul(mask * g, dG), mask * at::matmul(h, dG.t())};
  }
  return {at::conv_transpose2d(mask * g, dG, {}, 1, 1), mask * at::conv2d(h, dG, {}, 1, 1)};
}

// Gradients of the 2 L tensors (inputs, then grads) from those of the L matrices G.
Tensors backward_of_gradients(const Tensors& saved, const Tensors& incoming, const Kind& kind) {
  const size_t count = saved.size() / 2;
  Tensors out(2 * count);
  for (size_t l = 0; l < count; ++l) {
    if (incoming[l].defined()) {
      const PositionGradients gradients = backward_at(saved[l], saved[count + l], incoming[l], kind);
      out[l] = gradients.input;
      out[count + l] = gradients.grad;
    }
  }
  return out;
}

// Calls through the dispatcher.
template <typename Result>
Result call_op(const c10::TypedOperatorHandle<Positions::Signature<Result>>& op, const Positions& call) {
  return op.call(call.inputs, call.grads, call.layer, call.activation, call.scale);
}

Gradients call_gradients(const Positions& call) {
  static const auto op = registered_op<Positions::Signature<Gradients>>("growkernels::virtual_grads");
  return call_op(op, call);
}

at::Tensor call_norms(const Positions& call) {
  static const auto op = registered_op<Positions::Signature<at::Tensor>>("growkernels::virtual_grad_norms");
  return call_op(op, call);
}

at::Tensor call_accumulate(const Accumulation& call) {
  static const auto op = registered_op<Accumulation::Signature>("growkernels::accumulate_virtual_grads");
  return op.call(call.inputs, call.grads, call.layer, call.activation, call.scale, call.sums, call.second_moments);
}

bool has_tangents(const Positions& call) {
  return isFwGradDefinedTensorList(call.inputs) || isFwGradDefinedTensorList(call.grads);
}

Tensors joined(const Positions& call) {
  Tensors tensors(call.inputs.begin(), call.inputs.end());
  tensors.insert(tensors.end(), call.grads.begin(), call.grads.end());
  return tensors;
}

Gradients gradients(const Positions& call) {
  if (has_tangents(call)) {
    return checked<aten_gradients>(call);
  }
  return recorded(
      "VirtualGradsBackward", joined(call), [&] { return call_gradients(call); },
      [kind = call.kind()](const Tensors& saved, const Tensors& incoming, const CallNode::Wanted&) {
        return backward_of_gradients(saved, incoming, kind);
      });
}

at::Tensor norms(const Positions& call) {
  if (has_tangents(call)) {
    return checked<aten_gradient_norms>(call);
  }
  return recorded(
      "VirtualGradNormsBackward", joined(call), [&] { return call_norms(call); },
      [kind = call.kind(), layer = std::string(call.layer), activation = std::string(call.activation)](
          const Tensors& saved, const Tensors& incoming, const CallNode::Wanted&) {
        const size_t count = saved.size() / 2;
        const at::TensorList tensors(saved);
        Tensors gradients =
            call_gradients({tensors.slice(0, count), tensors.slice(count), layer, activation, kind.scale});
        for (size_t l = 0; l < count; ++l) {
          gradients[l] = 2 * incoming[0][static_cast<int64_t>(l)] * gradients[l];
        }
        return backward_of_gradients(saved, gradients, kind);
      });
}

// Accumulation is a measurement: never differentiable, whatever the inputs require.
at::Tensor accumulate(const Accumulation& call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor norms = call_accumulate(call);
  for (const at::Tensor& sum : call.sums) {
    torch::autograd::impl::bump_version(sum);
  }
  if (call.second_moments.has_value()) {
    torch::autograd::impl::bump_version(*call.second_moments);
  }
  return norms;
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Autograd, m) { implement<gradients, norms, accumulate>(m); }

}  // namespace growkernels::virtual_grad
