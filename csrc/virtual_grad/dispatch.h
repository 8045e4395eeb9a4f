#pragma once
// Calls of the family's ops through the dispatcher, from kernels that wrap others.

#include "common/op.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace growkernels::virtual_grad {

inline std::vector<at::Tensor> call_virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                                  c10::string_view activation, double scale) {
  static const auto op = registered_op<std::vector<at::Tensor>(at::TensorList, at::TensorList, c10::string_view,
                                                               c10::string_view, double)>("growkernels::virtual_grads");
  return op.call(inputs, grads, layer, activation, scale);
}

inline at::Tensor call_virtual_grad_norms(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                          c10::string_view activation, double scale) {
  static const auto op =
      registered_op<at::Tensor(at::TensorList, at::TensorList, c10::string_view, c10::string_view, double)>(
          "growkernels::virtual_grad_norms");
  return op.call(inputs, grads, layer, activation, scale);
}

inline at::Tensor call_accumulate_virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                                c10::string_view activation, double scale, at::TensorList sums,
                                                const std::optional<at::Tensor>& second_moments) {
  static const auto op = registered_op<at::Tensor(at::TensorList, at::TensorList, c10::string_view, c10::string_view,
                                                  double, at::TensorList, const std::optional<at::Tensor>&)>(
      "growkernels::accumulate_virtual_grads");
  return op.call(inputs, grads, layer, activation, scale, sums, second_moments);
}

}  // namespace growkernels::virtual_grad
