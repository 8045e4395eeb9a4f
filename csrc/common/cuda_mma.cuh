#pragma once
// The PTX instructions that tensor-core kernels are built of: matrix products of a warp, loads of their
// fragments from shared memory, asynchronous copies into it. Fragment layouts are those of the PTX ISA,
// section "Matrix multiply-accumulate". Compiled as host code (tests run kernels without a GPU), the same
// functions exchange fragments between the emulated threads of a warp and compute exactly those layouts.

#include "common/cuda_element.cuh"

#include <cstdint>

#ifndef __CUDACC__
#include <cstring>
#include <vector>
#endif

namespace growkernels::cuda {

#ifdef __CUDACC__

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

#else

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

#endif

}  // namespace growkernels::cuda
