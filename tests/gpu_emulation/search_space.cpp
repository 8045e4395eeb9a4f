// search_space_kernel under the launch shim; tests/ops/test_eigen_search_space_cuda_emulated.py calls it.

#include "cuda_on_host.h"

#include "eigen/cuda_search_space.cuh"

namespace {

using namespace growkernels::eigen;

template <typename T, int k>
auto kernel_for(int64_t d) {
  constexpr int most = 16 / sizeof(T);
  return search_space_width<T>(d) == most ? &search_space_kernel<T, k, most> : &search_space_kernel<T, k, 1>;
}

template <typename T>
void step(T* basis, T* images, double* projected, double* previous, bool* dead, T* norms, T* units, const T* product,
          int64_t n, int64_t k, int64_t d, int64_t count, int64_t threads) {
  cuda_on_host::launch(n, threads, 0, k == 1 ? kernel_for<T, 1>(d) : kernel_for<T, 2>(d),
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
