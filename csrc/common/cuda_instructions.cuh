#pragma once
// The PTX instructions that kernels are built of: conversions, matrix products of a warp, loads of their fragments
// from shared memory, asynchronous copies into it. Fragment layouts are those of the PTX ISA, section "Matrix
// multiply-accumulate". Where kernels are compiled for the host, tests/gpu_emulation/common has this file instead.

#include "common/cuda_element.cuh"

#include <cstdint>

namespace growkernels::cuda {

__device__ inline float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

__device__ inline float widen(Half x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}

// To the nearest, ties to even.
template <typename Element>
__device__ inline Element narrow(float x) {
  if constexpr (std::is_same_v<Element, float>) {
    return x;
  } else {
    Element out;
    if constexpr (std::is_same_v<Element, BFloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    }
    return out;
  }
}

// To 2^-11, relative to its value.
__device__ inline float approximate_tanh(float x) {
  float out;
  asm("tanh.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// 16 bytes in one access.
__device__ inline uint4 read_chunk(const void* from) { return *static_cast<const uint4*>(from); }
__device__ inline void write_chunk(void* to, const uint4& words) { *static_cast<uint4*>(to) = words; }

// threadIdx.x, read anew: what follows from it is then computed where it is used. The compiler would keep
// it from step to step instead, in registers that are needed elsewhere.
__device__ inline int thread_read_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 q + r names the address of row r of matrix q. A lane
// receives of matrix q the elements (row 2 (lane % 4), column lane / 4) and (row + 1, same column).
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8].
template <typename Element>
__device__ inline void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<Element, Half>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// d[16, 8] += a[16, 8] b[8, 8] in TensorFloat-32; a and b as round_to_tf32 returns them.
__device__ inline void multiply_accumulate_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t round_to_tf32(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}

// Copies `bytes` (0 to 16) to 16 bytes of shared memory and fills the rest with zeros. Both addresses are
// multiples of 16; `global` must be valid even where bytes is 0.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the newest `pending` groups of this thread's copies have arrived.
template <int pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
}

}  // namespace growkernels::cuda
