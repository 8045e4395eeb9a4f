#pragma once
// csrc/common/cuda_instructions.cuh for the host: the same functions, which exchange fragments between the emulated
// threads of a warp and compute exactly the layouts of the PTX ISA.

#include "common/cuda_element.cuh"
#include "cuda_on_host.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace growkernels::cuda {

inline float widen(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return std::copysign(magnitude, x.bits & 0x8000 ? -1.0f : 1.0f);
}

template <typename Element>
Element narrow(float x) {
  if constexpr (std::is_same_v<Element, float>) {
    return x;
  } else {
    Element out;
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
    return out;
  }
}

inline float approximate_tanh(float x) { return std::tanh(x); }

inline uint4 read_chunk(const void* from) {
  uint4 out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

inline void write_chunk(void* to, const uint4& words) { std::memcpy(to, &words, sizeof words); }

inline int thread_read_anew() { return threadIdx.x; }

namespace emulation {

// Whether asynchronous copies arrive at once or when they are waited for: the two extremes of what a GPU
// may do. The first shows memory overwritten too early, the second memory read too early.
inline bool copies_arrive_late = true;

inline void require(bool condition, const char* what) {
  if (!condition) {
    cuda_on_host::fail(what, cuda_on_host::Where::current());
  }
}

struct Copy {
  void* shared;
  const void* global;
  int bytes;

  void perform() const {
    std::memcpy(shared, global, bytes);
    std::memset(static_cast<char*>(shared) + bytes, 0, 16 - bytes);
  }
};

struct Thread {
  std::vector<std::vector<Copy> > groups;
  std::vector<Copy> uncommitted;
};

struct Warp {
  uint32_t words[32][6];
  const void* rows[32];
};

inline Thread& thread() {
  static std::vector<Thread> threads(1024);
  return threads[threadIdx.x];
}

inline Warp& warp() {
  static Warp warps[32];
  return warps[threadIdx.x / 32];
}

inline void exchange(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t* words = warp().words[threadIdx.x % 32];
  std::memcpy(words, a, sizeof a);
  words[4] = b0;
  words[5] = b1;
  __syncwarp();
}

// a(i, k) and b(k, j) look their element up in the words of the lane that holds it.
template <typename A, typename B>
void accumulate(float (&d)[4], int depth, A a, B b) {
  const int lane = threadIdx.x % 32;
  for (int q = 0; q < 4; ++q) {
    const int i = lane / 4 + 8 * (q / 2), j = 2 * (lane % 4) + q % 2;
    double sum = d[q];
    for (int k = 0; k < depth; ++k) {
      sum += static_cast<double>(a(i, k)) * b(k, j);
    }
    d[q] = static_cast<float>(sum);
  }
  __syncwarp();
}

}  // namespace emulation

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  emulation::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "ldmatrix of a row that is not 16-byte aligned");
  emulation::Warp& warp = emulation::warp();
  const int lane = threadIdx.x % 32;
  warp.rows[lane] = row;
  __syncwarp();
  for (int q = 0; q < 4; ++q) {
    const int k = 2 * (lane % 4), column = lane / 4;
    const auto element = [&](int r) {
      return static_cast<uint32_t>(static_cast<const uint16_t*>(warp.rows[8 * q + r])[column]);
    };
    out[q] = element(k) | element(k + 1) << 16;
  }
  __syncwarp();
}

template <typename Element>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::exchange(a, b0, b1);
  const auto& words = emulation::warp().words;
  const auto half = [](uint32_t word, int k) { return widen(Element{static_cast<uint16_t>(word >> 16 * (k % 2))}); };
  emulation::accumulate(
      d, 16, [&](int i, int k) { return half(words[4 * (i % 8) + k % 8 / 2][i / 8 + 2 * (k / 8)], k); },
      [&](int k, int j) { return half(words[4 * j + k % 8 / 2][4 + k / 8], k); });
}

inline void multiply_accumulate_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::exchange(a, b0, b1);
  const auto& words = emulation::warp().words;
  const auto value = [](uint32_t word) { return __builtin_bit_cast(float, word & 0xffffe000u); };
  emulation::accumulate(
      d, 8, [&](int i, int k) { return value(words[4 * (i % 8) + k % 4][i / 8 + 2 * (k / 4)]); },
      [&](int k, int j) { return value(words[4 * j + k % 4][4 + k / 4]); });
}

inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + 0x1000u;
}

inline void copy_async(void* shared, const void* global, int bytes) {
  emulation::require(reinterpret_cast<uintptr_t>(shared) % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0,
                     "cp.async of 16 bytes between addresses that are not 16-byte aligned");
  emulation::require(bytes >= 0 && bytes <= 16, "cp.async of fewer than 0 or more than 16 bytes");
  const emulation::Copy copy{shared, global, bytes};
  if (emulation::copies_arrive_late) {
    emulation::thread().uncommitted.push_back(copy);
  } else {
    copy.perform();
  }
}

inline void commit_copies() {
  emulation::Thread& thread = emulation::thread();
  thread.groups.push_back(std::move(thread.uncommitted));
  thread.uncommitted.clear();
}

template <int pending>
void wait_for_copies() {
  auto& groups = emulation::thread().groups;
  while (groups.size() > pending) {
    for (const emulation::Copy& copy : groups.front()) {
      copy.perform();
    }
    groups.erase(groups.begin());
  }
}

}  // namespace growkernels::cuda
