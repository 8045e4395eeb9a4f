#pragma once

#include <ATen/core/Tensor.h>

namespace growkernels {

// A matrix (not images) whose rows torch's products can read. On AMX those of bfloat16 (oneDNN 3.12) read one element
// behind rows of odd length, times 0: NaN where that is what lies there.
inline at::Tensor whole_rows(const at::Tensor& matrix) {
  const bool at_risk = matrix.device().is_cpu() && matrix.scalar_type() == at::kBFloat16 && matrix.dim() < 4;
  return at_risk ? matrix.contiguous() : matrix;
}

}  // namespace growkernels
