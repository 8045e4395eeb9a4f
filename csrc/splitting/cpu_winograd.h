#pragma once
// splitting_hvp_conv2d for 3 x 3 filters by Winograd's algorithm, float32, on the CPU.

#include "splitting/splitting.h"

namespace growkernels::splitting {

// Why it is not the way to compute this call, with filters [n, k, C, kh, kw]; null where it is.
const char* winograd_obstacle(const at::Tensor& x, const at::Tensor& w, const at::Tensor& filters,
                              const Sliding& sliding);

// y like filters, which are [n, k, C, 3, 3].
at::Tensor winograd_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& filters,
                        const std::array<int64_t, 2>& padding);

}  // namespace growkernels::splitting
