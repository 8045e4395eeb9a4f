#pragma once
// Reductions over the 32 lanes of a warp, which all get the result; always in the same order.

namespace growkernels::cuda {

// Of several values at once, in place: none waits for another.
template <typename... T>
__device__ __forceinline__ void take_warp_sums(T&... x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    ((x += __shfl_xor_sync(0xFFFFFFFF, x, distance)), ...);
  }
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  take_warp_sums(x);
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(0xFFFFFFFF, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace growkernels::cuda
