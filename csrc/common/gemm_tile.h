#pragma once
// Products of cache-sized tiles, the inner loop of every CPU kernel here:
//   C[m, n] (+)= A[m, k] B[k, n],  all row-major, single-threaded, called from inside at::parallel_for.
//
// Their code is in this library for all sizes and strides. Kernels that are generated for the sizes of a
// call, as oneDNN's are, are kept for ever, and a network that grows has new sizes at every step.

#include "common/bfloat16_tile.h"
#include "common/kernels_ran.h"
#include "common/portable_tile.h"

#include <ATen/core/Tensor.h>

#include <type_traits>

namespace growkernels {

// Sums of 16-bit and float32 products are kept in float32, sums of float64 products in float64.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// `depth` with the rows and columns of zeros behind it that tiles of this type need (bfloat16_tile.h).
template <typename Operand>
int64_t padded_depth(int64_t depth) {
  if constexpr (std::is_same_v<Operand, at::BFloat16>) {
    const int64_t step = bfloat16_step();
    return (depth + step - 1) / step * step;
  } else {
    return depth;
  }
}

// The type that values of a dtype are multiplied in: bfloat16 is widened to float32 where it has no tiles.
inline at::ScalarType tile_dtype(at::ScalarType dtype) {
  const bool tiles = dtype == at::kBFloat16 && bfloat16_tiles_obstacle(dtype) == nullptr;
  return dtype == at::kHalf || (dtype == at::kBFloat16 && !tiles) ? at::kFloat : dtype;
}

inline void multiply_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                          float* c, int64_t ldc, bool accumulate) {
  note(Ran::Portable);
  portable_tile(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

inline void multiply_tile(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                          double* c, int64_t ldc, bool accumulate) {
  note(Ran::Portable);
  portable_tile(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

// B holds pairs of rows interleaved. Only where bfloat16_unit() is not None.
inline void multiply_tile(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
                          int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  note(Ran::Bfloat16Tiles);
  bfloat16_tile(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

}  // namespace growkernels
