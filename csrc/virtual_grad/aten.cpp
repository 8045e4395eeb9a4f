// The family composed of ATen's ops (see virtual_grad.h for where it is used).

#include "common/kernels_ran.h"
#include "virtual_grad/virtual_grad.h"

#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/library.h>

namespace growkernels::virtual_grad {

at::Tensor aten_gradient(const at::Tensor& h, const at::Tensor& g, const Kind& kind) {
  note(Ran::Aten);
  const at::ScalarType dtype = gradient_dtype(h.scalar_type());
  if (kind.layer == Layer::Conv2dRelu) {
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
  return at::mm(grad_rows.t(), activate(rows, kind));
}

namespace {

at::Tensor squared_norm(const at::Tensor& x) {
  const at::Tensor flat = x.flatten();
  return at::dot(flat, flat);
}

}  // namespace

std::vector<at::Tensor> aten_gradients(at::TensorList inputs, at::TensorList grads, const Kind& kind,
                                       GradientAt gradient_at) {
  std::vector<at::Tensor> gradients;
  for (size_t l = 0; l < inputs.size(); ++l) {
    gradients.push_back(gradient_at(inputs[l], grads[l], kind));
  }
  return gradients;
}

at::Tensor aten_gradient_norms(at::TensorList inputs, at::TensorList grads, const Kind& kind, GradientAt gradient_at) {
  std::vector<at::Tensor> squares;
  for (size_t l = 0; l < inputs.size(); ++l) {
    squares.push_back(squared_norm(gradient_at(inputs[l], grads[l], kind)));
  }
  return at::stack(squares);
}

at::Tensor aten_accumulate(at::TensorList inputs, at::TensorList grads, const Kind& kind, at::TensorList sums,
                           const std::optional<at::Tensor>& second_moments, GradientAt gradient_at) {
  std::vector<at::Tensor> squares, batch_squares;
  for (size_t l = 0; l < inputs.size(); ++l) {
    const at::Tensor gradient = gradient_at(inputs[l], grads[l], kind);
    sums[l].add_(gradient);
    squares.push_back(squared_norm(sums[l]));
    if (second_moments.has_value()) {
      batch_squares.push_back(squared_norm(gradient));
    }
  }
  if (second_moments.has_value()) {
    second_moments->add_(at::stack(batch_squares));
  }
  return at::stack(squares);
}

namespace {

std::vector<at::Tensor> virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                      c10::string_view activation, double scale) {
  const Kind kind = parse_kind(layer, activation, scale);
  check_positions("virtual_grads", inputs, grads, kind);
  return aten_gradients(inputs, grads, kind);
}

at::Tensor virtual_grad_norms(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                              c10::string_view activation, double scale) {
  const Kind kind = parse_kind(layer, activation, scale);
  check_positions("virtual_grad_norms", inputs, grads, kind);
  return aten_gradient_norms(inputs, grads, kind);
}

at::Tensor accumulate_virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                    c10::string_view activation, double scale, at::TensorList sums,
                                    const std::optional<at::Tensor>& second_moments) {
  const Kind kind = parse_kind(layer, activation, scale);
  check_positions("virtual_grads", inputs, grads, kind);
  check_sums(inputs, sums, second_moments, kind);
  return aten_accumulate(inputs, grads, kind, sums, second_moments);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  m.impl("virtual_grads", &virtual_grads);
  m.impl("virtual_grad_norms", &virtual_grad_norms);
  m.impl("accumulate_virtual_grads", &accumulate_virtual_grads);
}

}  // namespace growkernels::virtual_grad
