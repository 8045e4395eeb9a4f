// The family composed of ATen's ops (see virtual_grad.h for where it is used).

#include "common/kernels_ran.h"
#include "virtual_grad/virtual_grad.h"

#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>

namespace growkernels::virtual_grad {

at::Tensor aten_gradient(const at::Tensor& h, const at::Tensor& g, const Kind& kind) {
  note(Ran::Aten);
  const at::ScalarType dtype = gradient_dtype(h.scalar_type());
  if (kind.layer == Layer::Conv2dRelu) {
    if (h.numel() == 0) {  // convolutions refuse images without pixels
      return at::zeros({h.size(1), h.size(1), 3, 3}, h.options().dtype(dtype));
    }
    const at::Tensor weight = at::empty({h.size(1), h.size(1), 3, 3}, h.options(), h.suggest_memory_format());
    const at::Tensor masked = at::threshold_backward(g, h, 0);
    const auto [input_grad, weight_grad, bias_grad] = at::convolution_backward(
        masked, h, weight, std::nullopt, {1, 1}, {1, 1}, {1, 1}, false, {0, 0}, 1, {false, true, false});
    return weight_grad.to(dtype).contiguous();
  }
  const at::Tensor rows = h.flatten(0, -2).to(dtype);
  const at::Tensor grad_rows = g.flatten(0, -2).to(dtype);
  if (kind.layer == Layer::LinearRelu) {
    return at::mm(at::threshold_backward(grad_rows, rows, 0).t(), rows);
  }
  return at::mm(grad_rows.t(), kind.layer == Layer::Residual ? activate(rows, kind) : rows);
}

namespace {

at::Tensor squared_norm(const at::Tensor& x) {
  const at::Tensor flat = x.flatten();
  return at::dot(flat, flat);
}

}  // namespace

Gradients gradients_one_by_one(const Positions& call, const Kind& kind, GradientAt gradient_at) {
  Gradients gradients;
  for (size_t l = 0; l < call.inputs.size(); ++l) {
    gradients.push_back(gradient_at(call.inputs[l], call.grads[l], kind));
  }
  return gradients;
}

at::Tensor norms_one_by_one(const Positions& call, const Kind& kind, GradientAt gradient_at) {
  std::vector<at::Tensor> squares;
  for (size_t l = 0; l < call.inputs.size(); ++l) {
    squares.push_back(squared_norm(gradient_at(call.inputs[l], call.grads[l], kind)));
  }
  return at::stack(squares);
}

at::Tensor accumulate_one_by_one(const Accumulation& call, const Kind& kind, GradientAt gradient_at) {
  std::vector<at::Tensor> squares, batch_squares;
  for (size_t l = 0; l < call.inputs.size(); ++l) {
    const at::Tensor gradient = gradient_at(call.inputs[l], call.grads[l], kind);
    call.sums[l].add_(gradient);
    squares.push_back(squared_norm(call.sums[l]));
    if (call.second_moments.has_value()) {
      batch_squares.push_back(squared_norm(gradient));
    }
  }
  if (call.second_moments.has_value()) {
    call.second_moments->add_(at::stack(batch_squares));
  }
  return at::stack(squares);
}

Gradients aten_gradients(const Positions& call, const Kind& kind) {
  return gradients_one_by_one(call, kind, aten_gradient);
}

at::Tensor aten_gradient_norms(const Positions& call, const Kind& kind) {
  return norms_one_by_one(call, kind, aten_gradient);
}

at::Tensor aten_accumulate(const Accumulation& call, const Kind& kind) {
  return accumulate_one_by_one(call, kind, aten_gradient);
}

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  implement<checked<aten_gradients>, checked<aten_gradient_norms>, checked<aten_accumulate>>(m);
}

}  // namespace growkernels::virtual_grad
