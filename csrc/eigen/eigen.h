#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace growkernels::eigen {

// Raises for anything but a floating-point [n, m, m].
void check_matrices(const at::Tensor& a);

// By torch.linalg.eigh.
std::tuple<at::Tensor, at::Tensor> eigs_by_torch(const at::Tensor& a);

}  // namespace growkernels::eigen
