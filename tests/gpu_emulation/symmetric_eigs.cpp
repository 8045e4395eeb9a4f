// symmetric_eigs_kernel under the launch shim; tests/ops/test_eigen_cuda_emulated.py calls it.

#include "cuda_on_host.h"

#include "eigen/cuda_jacobi.cuh"

#include <vector>

namespace {

using namespace growkernels::eigen;

// `threads`: 0 for as many as the launcher takes; `blocks`: fewer than n share the matrices.
// `shared` decides where the workspace lies.
template <typename T>
void eigs(const T* a, T* values, T* vectors, int64_t n, int64_t m, int64_t threads, int64_t blocks, bool shared) {
  const SymmetricEigsLaunch plan(static_cast<int>(m), 227 << 10);
  threads = threads == 0 ? plan.threads : threads;
  std::vector<unsigned char> memory(shared ? 0 : plan.bytes * blocks, 0xFF);
  const auto kernel =
      threads == 32
          ? (shared ? &symmetric_eigs_kernel<T, OneWarp, true> : &symmetric_eigs_kernel<T, OneWarp, false>)
          : (shared ? &symmetric_eigs_kernel<T, WholeBlock, true> : &symmetric_eigs_kernel<T, WholeBlock, false>);
  cuda_on_host::launch(blocks, threads, shared ? plan.bytes : 0, kernel, a, values, vectors, n, static_cast<int>(m),
                       memory.data());
}

}  // namespace

CUDA_ON_HOST_EXPORT void eigs_float32(const float* a, float* values, float* vectors, int64_t n, int64_t m,
                                      int64_t threads, int64_t blocks, int64_t shared) {
  eigs(a, values, vectors, n, m, threads, blocks, shared != 0);
}

CUDA_ON_HOST_EXPORT void eigs_float64(const double* a, double* values, double* vectors, int64_t n, int64_t m,
                                      int64_t threads, int64_t blocks, int64_t shared) {
  eigs(a, values, vectors, n, m, threads, blocks, shared != 0);
}

// Whether a workspace lies in shared memory where a block may have `most_shared` bytes of it, and its bytes.
CUDA_ON_HOST_EXPORT void eigen_launch(int64_t m, int64_t most_shared, int64_t* in_shared, int64_t* bytes) {
  const SymmetricEigsLaunch plan(static_cast<int>(m), most_shared);
  *in_shared = plan.in_shared;
  *bytes = plan.bytes;
}
