#pragma once
// What every implementation of the family shares: the kinds of virtual layers and the argument checks.

#include "virtual_grad/kind.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

namespace growkernels::virtual_grad {

// Throws one sentence when a name is unknown.
Kind parse_kind(std::string_view layer, std::string_view activation, double scale);

// Throws one sentence when lists, shapes, dtypes or devices do not fit. Works on symbolic shapes too.
void check_positions(const char* op, at::TensorList inputs, at::TensorList grads, const Kind& kind);
void check_sums(at::TensorList inputs, at::TensorList sums, const std::optional<at::Tensor>& second_moments,
                const Kind& kind);

// Throws one sentence when two of the buffers share memory: positions are added up side by side.
void check_separate(at::TensorList sums);

// [samples, width] with contiguous rows: a view where the strides allow it.
at::Tensor as_rows(const at::Tensor& x);

// dtype of G and of the norms: float32 for 16-bit inputs, else the inputs' own.
at::ScalarType gradient_dtype(at::ScalarType input);

// Shape of G at one position: [d, d], or [C, C, 3, 3] for a convolution.
c10::SymDimVector gradient_shape(const at::Tensor& input, const Kind& kind);

// sigma(scale * x), of ATen's own functions.
at::Tensor activate(const at::Tensor& x, const Kind& kind);

// G at one position, composed of ATen's ops: for devices and dtypes without a kernel of their own.
at::Tensor aten_gradient(const at::Tensor& h, const at::Tensor& g, const Kind& kind);

// Why the CUDA kernels do not compute a call; null where they do.
const char* cuda_obstacle(at::ScalarType dtype, const Kind& kind);

// The family composed of ATen's ops and of gradients at single positions, one after the other.
using GradientAt = at::Tensor (*)(const at::Tensor& h, const at::Tensor& g, const Kind& kind);
std::vector<at::Tensor> aten_gradients(at::TensorList inputs, at::TensorList grads, const Kind& kind,
                                       GradientAt gradient_at = aten_gradient);
at::Tensor aten_gradient_norms(at::TensorList inputs, at::TensorList grads, const Kind& kind,
                               GradientAt gradient_at = aten_gradient);
at::Tensor aten_accumulate(at::TensorList inputs, at::TensorList grads, const Kind& kind, at::TensorList sums,
                           const std::optional<at::Tensor>& second_moments, GradientAt gradient_at = aten_gradient);

}  // namespace growkernels::virtual_grad
