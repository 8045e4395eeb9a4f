#include "eigen/cuda_jacobi.cuh"
#include "eigen/cuda_launch.h"

namespace growkernels::eigen {
namespace {

template <typename T>
auto kernel_of(const SymmetricEigsLaunch& plan) {
  return plan.threads == 32 ? &symmetric_eigs_kernel<T, OneWarp, true>
         : plan.in_shared   ? &symmetric_eigs_kernel<T, WholeBlock, true>
                            : &symmetric_eigs_kernel<T, WholeBlock, false>;
}

}  // namespace

template <typename T>
cudaError_t launch_symmetric_eigs(const SymmetricEigsLaunch& plan, unsigned blocks, const T* a, T* values, T* vectors,
                                  int64_t n, int m, unsigned char* workspace, cudaStream_t stream) {
  const auto kernel = kernel_of<T>(plan);
  const size_t shared = plan.in_shared ? plan.bytes : 0;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (allowed != cudaSuccess) {
    return allowed;
  }
  kernel<<<blocks, plan.threads, shared, stream>>>(a, values, vectors, n, m, workspace);
  return cudaGetLastError();
}

template cudaError_t launch_symmetric_eigs(const SymmetricEigsLaunch&, unsigned, const float*, float*, float*, int64_t,
                                           int, unsigned char*, cudaStream_t);
template cudaError_t launch_symmetric_eigs(const SymmetricEigsLaunch&, unsigned, const double*, double*, double*,
                                           int64_t, int, unsigned char*, cudaStream_t);

}  // namespace growkernels::eigen
