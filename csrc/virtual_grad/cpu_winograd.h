#pragma once
// Convolution positions by Winograd's algorithm, float32, on the CPU.

#include <ATen/core/Tensor.h>

namespace growkernels::virtual_grad {

// Why it is not the way to compute the gradient at a position [N, C, H, W]; null where it is.
const char* winograd_obstacle(const at::Tensor& h);

// G [C, C, 3, 3] at one position.
at::Tensor winograd_gradient(const at::Tensor& h, const at::Tensor& g);

}  // namespace growkernels::virtual_grad
