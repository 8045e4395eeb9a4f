#pragma once
// 16-bit floating-point numbers as their bits, for kernels that know nothing of torch and that also
// compile as host code, and the elementwise operations on packed words.

#include <cstdint>
#include <type_traits>

namespace growkernels::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

__device__ inline float widen(float x) { return x; }

// 16 bytes of elements, wherever they are aligned to 16 bytes, in one access.
template <typename Element>
struct alignas(16) Chunk {
  static constexpr int size = 16 / sizeof(Element);
  Element values[size];
};

// The 32 bits of `values` (one float, or two 16-bit numbers) with zeros where `of` is not positive.
template <typename Element>
__device__ inline uint32_t keep_positive(uint32_t values, uint32_t of) {
  // A positive number, infinity included, is an integer from 1 to that of infinity; NaN lies above.
  if constexpr (std::is_same_v<Element, float>) {
    return of - 1u < 0x7f800000u ? values : 0u;
  } else {
    constexpr uint32_t infinity = std::is_same_v<Element, BFloat16> ? 0x7f80u : 0x7c00u;
    const uint32_t low = (of & 0xffffu) - 1u < infinity ? 0x0000ffffu : 0u;
    const uint32_t high = (of >> 16) - 1u < infinity ? 0xffff0000u : 0u;
    return values & (low | high);
  }
}

}  // namespace growkernels::cuda
