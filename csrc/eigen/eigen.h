#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace growkernels::eigen {

// Raises for anything but a floating-point [n, m, m].
void check_matrices(const at::Tensor& a);
// The eigenpairs asked for; raises unless there are so many. None means all.
int64_t check_pairs(const at::Tensor& a, std::optional<int64_t> k);

// Why the CUDA kernel does not solve for these matrices; null where it does.
const char* cuda_obstacle(const at::Tensor& a);

// By torch.linalg.eigh.
std::tuple<at::Tensor, at::Tensor> eigs_by_torch(const at::Tensor& a, std::optional<int64_t> k);

}  // namespace growkernels::eigen
