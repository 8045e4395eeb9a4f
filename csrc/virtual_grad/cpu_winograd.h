#pragma once
// Convolution positions by Winograd's algorithm, float32, on the CPU.

#include <ATen/core/Tensor.h>

namespace growkernels::virtual_grad {

// Whether it is the fastest way to compute the gradient at a position [N, C, H, W].
bool winograd_pays(const at::Tensor& h);

// G [C, C, 3, 3] at one position.
at::Tensor winograd_gradient(const at::Tensor& h, const at::Tensor& g);

}  // namespace growkernels::virtual_grad
