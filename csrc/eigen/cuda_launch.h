#pragma once
// Launches of the family's kernels on memory at plain addresses. The kernels are nvcc's; what includes torch's
// headers is left to the C++ compiler, which has them precompiled. They meet here.

#include "eigen/cuda_plan.h"

#include <cuda_runtime_api.h>

namespace growkernels::eigen {

// Eigenpairs of a, [n, m, m], by so many blocks; values [n, m], vectors [n, m, m]. `workspace` has plan.bytes
// for each block, or is null where plan.in_shared.
template <typename T>
cudaError_t launch_symmetric_eigs(const SymmetricEigsLaunch& plan, unsigned blocks, const T* a, T* values, T* vectors,
                                  int64_t n, int m, unsigned char* workspace, cudaStream_t stream);

// A step with `product`, [n, k, d], k of 1 or 2: see cuda_search_space.cuh. Arrays may begin anywhere.
template <typename T>
cudaError_t launch_search_space_step(const SearchSpace<T>& state, const T* product, unsigned n, int k, int d, int count,
                                     cudaStream_t stream);

}  // namespace growkernels::eigen
