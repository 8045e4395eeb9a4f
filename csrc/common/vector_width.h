#pragma once
// One loop, compiled once per instruction set, chosen at run time.
//
// A loop is a struct with `template <int bytes> static void run(arguments)`, always_inline, written
// with GCC's vector types for registers of that many bytes. widest<Loop>(arguments) runs it in the
// widest registers that this CPU has. Needed because the library is built for a baseline CPU.

#include <cstdint>

namespace growkernels {

// A register's worth of T; loads and stores through it need no alignment and may alias T.
template <typename T, int bytes>
using Vector [[gnu::vector_size(bytes), gnu::aligned(alignof(T)), gnu::may_alias]] = T;

template <typename Loop, typename... Arguments>
[[gnu::noinline]] void run_in_16_bytes(Arguments... arguments) {
  Loop::template run<16>(arguments...);
}

#ifdef __x86_64__
template <typename Loop, typename... Arguments>
[[gnu::noinline, gnu::target("avx2,fma,f16c")]] void run_in_32_bytes(Arguments... arguments) {
  Loop::template run<32>(arguments...);
}

template <typename Loop, typename... Arguments>
[[gnu::noinline, gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]] void run_in_64_bytes(
    Arguments... arguments) {
  Loop::template run<64>(arguments...);
}
#endif

// A loop within a loop, compiled apart from it so that it has all the registers for itself.
template <int bytes, typename Loop, typename... Arguments>
[[gnu::always_inline]] inline void apart(Arguments... arguments) {
#ifdef __x86_64__
  if constexpr (bytes == 64) {
    return run_in_64_bytes<Loop>(arguments...);
  } else if constexpr (bytes == 32) {
    return run_in_32_bytes<Loop>(arguments...);
  }
#endif
  return run_in_16_bytes<Loop>(arguments...);
}

template <typename Loop, typename... Arguments>
void widest(Arguments... arguments) {
  static void (*const run)(Arguments...) = [] {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return &run_in_64_bytes<Loop, Arguments...>;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return &run_in_32_bytes<Loop, Arguments...>;
    }
#endif
    return &run_in_16_bytes<Loop, Arguments...>;
  }();
  run(arguments...);
}

}  // namespace growkernels
