// Shapes and dtypes without data, for fake tensors, torch.compile and torch.export.

#include "virtual_grad/virtual_grad.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace growkernels::virtual_grad {
namespace {

at::Tensor empty_norms(at::TensorList inputs) {
  return at::empty({static_cast<int64_t>(inputs.size())},
                   inputs[0].options().dtype(gradient_dtype(inputs[0].scalar_type())));
}

std::vector<at::Tensor> virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                      c10::string_view activation, double scale) {
  const Kind kind = parse_kind(layer, activation, scale);
  check_positions("virtual_grads", inputs, grads, kind);
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& h : inputs) {
    gradients.push_back(at::empty_symint(gradient_shape(h, kind), h.options().dtype(gradient_dtype(h.scalar_type()))));
  }
  return gradients;
}

at::Tensor virtual_grad_norms(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                              c10::string_view activation, double scale) {
  check_positions("virtual_grad_norms", inputs, grads, parse_kind(layer, activation, scale));
  return empty_norms(inputs);
}

at::Tensor accumulate_virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                    c10::string_view activation, double scale, at::TensorList sums,
                                    const std::optional<at::Tensor>& second_moments) {
  const Kind kind = parse_kind(layer, activation, scale);
  check_positions("virtual_grads", inputs, grads, kind);
  check_sums(inputs, sums, second_moments, kind);
  return empty_norms(inputs);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Meta, m) {
  m.impl("virtual_grads", &virtual_grads);
  m.impl("virtual_grad_norms", &virtual_grad_norms);
  m.impl("accumulate_virtual_grads", &accumulate_virtual_grads);
}

}  // namespace growkernels::virtual_grad
