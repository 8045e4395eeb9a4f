#pragma once
// Squares of registers, transposed without going through memory.

#include "common/vector_width.h"

namespace growkernels {

// Transposes a square of registers: after the step with distance d, the halves of every pair of rows
// d apart have changed places.
template <typename T, int bytes, int distance, typename Integer>
[[gnu::always_inline]] inline void transpose_registers(Vector<T, bytes>* rows) {
  constexpr int lanes = bytes / sizeof(T);
  using Indices [[gnu::vector_size(bytes)]] = Integer;
  Indices upper, lower;
  for (int j = 0; j < lanes; ++j) {
    upper[j] = (j & distance) == 0 ? j : lanes + j - distance;
    lower[j] = (j & distance) == 0 ? j + distance : lanes + j;
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if ((i & distance) == 0) {
      const Vector<T, bytes> first = rows[i], second = rows[i + distance];
      rows[i] = __builtin_shuffle(first, second, upper);
      rows[i + distance] = __builtin_shuffle(first, second, lower);
    }
  }
  if constexpr (distance > 1) {
    transpose_registers<T, bytes, distance / 2, Integer>(rows);
  }
}

}  // namespace growkernels
