#include "eigen/cuda_launch.h"
#include "eigen/cuda_search_space.cuh"

namespace growkernels::eigen {
namespace {

template <typename T, int k>
auto kernel_of(int d, bool in_packs) {
  constexpr int most = 16 / sizeof(T);
  return in_packs && search_space_width<T>(d) == most ? &search_space_kernel<T, k, most>
                                                      : &search_space_kernel<T, k, 1>;
}

}  // namespace

template <typename T>
cudaError_t launch_search_space_step(const SearchSpace<T>& state, const T* product, unsigned n, int k, int d, int count,
                                     cudaStream_t stream) {
  bool in_packs = true;
  for (const T* array : {product, static_cast<const T*>(state.basis), static_cast<const T*>(state.images)}) {
    in_packs &= reinterpret_cast<uintptr_t>(array) % 16 == 0;
  }
  const auto kernel = k == 1 ? kernel_of<T, 1>(d, in_packs) : kernel_of<T, 2>(d, in_packs);
  kernel<<<n, search_space_threads(d), 0, stream>>>(state, product, d, count);
  return cudaGetLastError();
}

template cudaError_t launch_search_space_step(const SearchSpace<float>&, const float*, unsigned, int, int, int,
                                              cudaStream_t);
template cudaError_t launch_search_space_step(const SearchSpace<double>&, const double*, unsigned, int, int, int,
                                              cudaStream_t);

}  // namespace growkernels::eigen
