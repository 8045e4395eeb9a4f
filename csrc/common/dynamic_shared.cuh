#pragma once
// Dynamic shared memory by a function: the usual declaration without a size is not C++. Where kernels are compiled
// for the host, tests/gpu_emulation/common has this file instead.

namespace growkernels {

// The block's dynamic shared memory, aligned to 1024 bytes; the same for every T.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

}  // namespace growkernels
