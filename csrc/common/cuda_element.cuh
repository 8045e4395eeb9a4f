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

// The 32 bits of `values` (one float, or two 16-bit numbers) with zeros where `of` is at most 0, which NaN is not.
template <typename Element>
__device__ inline uint32_t keep_active(uint32_t values, uint32_t of) {
  // What has no sign is an integer from 0 to below the sign's; NaN with a sign lies above minus infinity.
  if constexpr (std::is_same_v<Element, float>) {
    return of - 1u < 0x7fffffffu || of > 0xff800000u ? values : 0u;
  } else {
    constexpr uint32_t minus_infinity = std::is_same_v<Element, BFloat16> ? 0xff80u : 0xfc00u;
    const uint32_t first = of & 0xffffu, second = of >> 16;
    const uint32_t low = first - 1u < 0x7fffu || first > minus_infinity ? 0x0000ffffu : 0u;
    const uint32_t high = second - 1u < 0x7fffu || second > minus_infinity ? 0xffff0000u : 0u;
    return values & (low | high);
  }
}

}  // namespace growkernels::cuda
