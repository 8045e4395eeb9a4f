#pragma once
// The CUDA dialect for the host's compiler, so that tests execute the arithmetic and the indexing
// of kernels on a machine without a GPU. A test's source includes this, then the kernel header, and
// exports functions of pointers, int64_t and double that call `launch`; host_compiler.py builds and
// calls them. The folder `common` holds what csrc/common writes in nvcc's dialect alone. Blocks run one after another
// and threads take turns: what needs real concurrency, such as a race between blocks, does not show here.

#ifdef __CUDACC__
#error "cuda_on_host.h is for the host's compiler; nvcc has the real thing"
#endif

#include "block_scheduler.h"

#include <math.h>

#include <bit>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

#define CUDA_ON_HOST_EXPORT extern "C" __attribute__((visibility("default")))

#define CUDA_ON_HOST_VECTORS(T, name, bytes)                 \
  struct alignas(bytes / 2) name##2 { T x, y; };             \
  struct alignas(bytes) name##4 { T x, y, z, w; };           \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_HOST_VECTORS(float, float, 16)
CUDA_ON_HOST_VECTORS(int, int, 16)
CUDA_ON_HOST_VECTORS(unsigned, uint, 16)
CUDA_ON_HOST_VECTORS(short, short, 8)
CUDA_ON_HOST_VECTORS(unsigned short, ushort, 8)
#undef CUDA_ON_HOST_VECTORS
struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace cuda_on_host {

// kernel<<<grid, block, shared_bytes>>>(arguments...)
template <typename... Parameters, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  run_grid(grid, block, shared_bytes, [&values, kernel] { std::apply(kernel, values); });
}

template <typename T>
struct Shuffle {
  T value;
  unsigned source;  // a lane
  bool undefined;

  static void complete(const Offers& offers) {
    std::array<T, warpSize> brought{};
    for (unsigned lane = 0; lane < warpSize; ++lane) {
      if (offers[lane] != nullptr) {
        brought[lane] = static_cast<Shuffle*>(offers[lane])->value;
      }
    }
    for (void* offer : offers) {
      if (offer != nullptr) {
        auto& mine = *static_cast<Shuffle*>(offer);
        mine.undefined = offers[mine.source] == nullptr;
        mine.value = brought[mine.source];
      }
    }
  }
};

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const Where& where) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  Shuffle<T> mine{value, source, false};
  meet_warp(mask, &Shuffle<T>::complete, &mine, where);
  if (mine.undefined) {
    fail("a shuffle reads lane " + std::to_string(source) + ", which takes no part in it", where);
  }
  return mine.value;
}

struct Vote {
  unsigned bits;

  static void complete(const Offers& offers) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < warpSize; ++lane) {
      if (offers[lane] != nullptr && static_cast<Vote*>(offers[lane])->bits != 0) {
        ballot |= 1u << lane;
      }
    }
    for (void* offer : offers) {
      if (offer != nullptr) {
        static_cast<Vote*>(offer)->bits = ballot;
      }
    }
  }
};

inline void complete_barrier(const Offers&) {}

inline unsigned lane_now() { return lane_of(machine.running); }

template <typename T, typename F>
T exchange(T* address, F&& update) {
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace cuda_on_host

inline void __syncthreads(cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::meet_block(0, where);
}

inline int __syncthreads_or(int predicate, cuda_on_host::Where where = cuda_on_host::Where::current()) {
  return cuda_on_host::meet_block(predicate != 0, where) != 0;
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFF, cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::meet_warp(mask, &cuda_on_host::complete_barrier, &mask, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_on_host::Where where = cuda_on_host::Where::current()) {
  const unsigned first = cuda_on_host::lane_now() / width * width;
  return cuda_on_host::shuffle(mask, value, first + static_cast<unsigned>(source) % width, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,
                  cuda_on_host::Where where = cuda_on_host::Where::current()) {
  const unsigned lane = cuda_on_host::lane_now(), source = lane ^ static_cast<unsigned>(bits);
  // A later segment cannot be read, an earlier one can.
  return cuda_on_host::shuffle(mask, value, source >= (lane / width + 1) * width ? lane : source, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = warpSize,
                 cuda_on_host::Where where = cuda_on_host::Where::current()) {
  const unsigned lane = cuda_on_host::lane_now();
  return cuda_on_host::shuffle(mask, value, lane % width < distance ? lane : lane - distance, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = warpSize,
                   cuda_on_host::Where where = cuda_on_host::Where::current()) {
  const unsigned lane = cuda_on_host::lane_now();
  return cuda_on_host::shuffle(mask, value,
                               lane % width + distance >= static_cast<unsigned>(width) ? lane : lane + distance, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::Vote mine{predicate != 0};
  cuda_on_host::meet_warp(mask, &cuda_on_host::Vote::complete, &mine, where);
  return mine.bits;
}

inline int __any_sync(unsigned mask, int predicate, cuda_on_host::Where where = cuda_on_host::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, cuda_on_host::Where where = cuda_on_host::Where::current()) {
  return __ballot_sync(mask, !predicate, where) == 0;
}

// Threads take turns, so plain updates are atomic.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::exchange(address, [&](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::exchange(address, [&](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::exchange(address, [&](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return cuda_on_host::exchange(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_on_host::exchange(address, [&](T old) { return old == expected ? value : old; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

[[noreturn]] inline void __trap(cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::fail("__trap()", where);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }

template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}
