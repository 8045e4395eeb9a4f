#pragma once

#include <ATen/core/Tensor.h>

namespace growkernels::splitting {

// Raises for anything but a floating-point [n, m, m].
void check_matrices(const at::Tensor& a);

}  // namespace growkernels::splitting
