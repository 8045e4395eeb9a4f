// search_space_kernel under the launch shim; tests/ops/test_search_space_cuda_emulated.py calls it.

#include "cuda_on_host.h"

#include "splitting/cuda_search_space.cuh"

namespace {

using namespace growkernels::splitting;

template <typename T>
void step(T* basis, T* images, double* projected, double* previous, bool* dead, T* norms, T* units, const T* product,
          int64_t n, int64_t k, int64_t d, int64_t count, int64_t threads) {
  cuda_on_host::launch(n, threads, 0, k == 1 ? &search_space_kernel<T, 1> : &search_space_kernel<T, 2>,
                       SearchSpace<T>{basis, images, projected, previous, dead, norms, units}, product,
                       static_cast<int>(d), static_cast<int>(count));
}

}  // namespace

CUDA_ON_HOST_EXPORT void step_float32(float* basis, float* images, double* projected, double* previous, bool* dead,
                                      float* norms, float* units, const float* product, int64_t n, int64_t k, int64_t d,
                                      int64_t count, int64_t threads) {
  step(basis, images, projected, previous, dead, norms, units, product, n, k, d, count, threads);
}

CUDA_ON_HOST_EXPORT void step_float64(double* basis, double* images, double* projected, double* previous, bool* dead,
                                      double* norms, double* units, const double* product, int64_t n, int64_t k,
                                      int64_t d, int64_t count, int64_t threads) {
  step(basis, images, projected, previous, dead, norms, units, product, n, k, d, count, threads);
}
