#pragma once
// 16-bit floating-point numbers as their bits, for kernels that know nothing of torch and that also
// compile as host code: conversions, and the elementwise operations on packed words.

#include <cstdint>
#include <type_traits>

#ifndef __CUDACC__
#include <cmath>
#endif

namespace growkernels::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

__device__ inline float widen(float x) { return x; }

__device__ inline float widen(BFloat16 x) {
#ifdef __CUDACC__
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
#else
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
#endif
}

__device__ inline float widen(Half x) {
#ifdef __CUDACC__
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return std::copysign(magnitude, x.bits & 0x8000 ? -1.0f : 1.0f);
#endif
}

// To the nearest, ties to even.
template <typename Element>
__device__ inline Element narrow(float x) {
  if constexpr (std::is_same_v<Element, float>) {
    return x;
  } else {
    Element out;
#ifdef __CUDACC__
    if constexpr (std::is_same_v<Element, BFloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    }
#else
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if constexpr (std::is_same_v<Element, BFloat16>) {
      out.bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
      const uint16_t sign = bits >> 16 & 0x8000;
      const float magnitude = std::fabs(x);
      if (std::isnan(x)) {
        out.bits = 0x7fff;
      } else if (magnitude >= 65520.0f) {
        out.bits = sign | 0x7c00;
      } else if (magnitude < 0x1p-14f) {  // multiples of 2^-24; 1024 of them are the first normal number
        out.bits = sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
      } else {
        const uint32_t positive = bits & 0x7fffffff;
        out.bits = sign | static_cast<uint16_t>((positive - 0x38000000u + 0xfff + (positive >> 13 & 1)) >> 13);
      }
    }
#endif
    return out;
  }
}

// 16 bytes of elements, wherever they are aligned to 16 bytes, in one access.
template <typename Element>
struct alignas(16) Chunk {
  static constexpr int size = 16 / sizeof(Element);
  Element values[size];
};

__device__ inline uint4 read_chunk(const void* from) {
#ifdef __CUDACC__
  return *static_cast<const uint4*>(from);
#else
  uint4 out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
#endif
}

__device__ inline void write_chunk(void* to, const uint4& words) {
#ifdef __CUDACC__
  *static_cast<uint4*>(to) = words;
#else
  __builtin_memcpy(to, &words, sizeof words);
#endif
}

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
