#include "common/portable_tile.h"

#include "common/vector_width.h"

#include <algorithm>

namespace growkernels {
namespace {

// Element (i, p) of A, which is stored [m, k], or [k, m] when transposed.
template <bool transposed, typename T>
[[gnu::always_inline]] inline const T* element(const T* a, int64_t lda, int64_t i, int64_t p) {
  return transposed ? a + p * lda + i : a + i * lda + p;
}

// A register block of C (rows x vectors) stays in registers over all of k: the outer-product form of
// Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008). No packing: the
// callers' tiles are cache-sized already.
template <bool transposed, typename T, int bytes, int rows, int vectors>
[[gnu::always_inline]] inline void register_block(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                                                  int64_t ldc, bool accumulate) {
  using V = Vector<T, bytes>;
  constexpr int lanes = bytes / sizeof(T);
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      sum[i][j] = V{};
    }
  }
  for (int64_t p = 0; p < k; ++p) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const V b_value = *reinterpret_cast<const V*>(b + p * ldb + j * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        sum[i][j] += *element<transposed>(a, lda, i, p) * b_value;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      V& target = *reinterpret_cast<V*>(c + i * ldc + j * lanes);
      target = accumulate ? target + sum[i][j] : sum[i][j];  // at the end, for shorter chains of roundings
    }
  }
}

// All rows of a panel of C that is `vectors` vectors wide.
template <bool transposed, typename T, int bytes, int rows, int vectors>
[[gnu::always_inline]] inline void column_panel(int64_t m, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                                                T* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + rows <= m; i += rows) {
    register_block<transposed, T, bytes, rows, vectors>(k, element<transposed>(a, lda, i, 0), lda, b, ldb, c + i * ldc,
                                                        ldc, accumulate);
  }
  for (; i + 2 <= m; i += 2) {
    register_block<transposed, T, bytes, 2, vectors>(k, element<transposed>(a, lda, i, 0), lda, b, ldb, c + i * ldc,
                                                     ldc, accumulate);
  }
  for (; i < m; ++i) {
    register_block<transposed, T, bytes, 1, vectors>(k, element<transposed>(a, lda, i, 0), lda, b, ldb, c + i * ldc,
                                                     ldc, accumulate);
  }
}

// The last columns of C, fewer than one vector: computed on copies of B and C padded to a vector.
template <bool transposed, typename T, int bytes, int rows>
[[gnu::always_inline]] inline void edge_panel(int64_t m, int64_t width, int64_t k, const T* a, int64_t lda, const T* b,
                                              int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int lanes = bytes / sizeof(T);
  constexpr int64_t k_block = 128;
  T b_padded[k_block * lanes] = {};
  T c_padded[rows * lanes];
  for (int64_t p = 0; p < k; p += k_block) {
    const int64_t depth = std::min(k_block, k - p);
    for (int64_t q = 0; q < depth; ++q) {
      std::copy_n(b + (p + q) * ldb, width, b_padded + q * lanes);
    }
    for (int64_t i = 0; i < m; i += rows) {
      const int64_t height = std::min<int64_t>(rows, m - i);
      column_panel<transposed, T, bytes, rows, 1>(height, depth, element<transposed>(a, lda, i, p), lda, b_padded,
                                                  lanes, c_padded, lanes, false);
      for (int64_t r = 0; r < height; ++r) {
        for (int64_t j = 0; j < width; ++j) {
          T& target = c[(i + r) * ldc + j];
          target = accumulate || p > 0 ? target + c_padded[r * lanes + j] : c_padded[r * lanes + j];
        }
      }
    }
  }
}

// Block shapes fill, and do not overflow, the vector registers: 32 of 64 bytes, 16 of 32 or 16 bytes.
template <int bytes>
constexpr int block_rows = bytes == 64   ? 8
                           : bytes == 32 ? 6
                                         : 4;
template <int bytes>
constexpr int block_vectors = bytes == 64 ? 3 : 2;

template <bool transposed, typename T>
struct Tile {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                                                int64_t ldb, T* c, int64_t ldc, bool accumulate) {
    constexpr int lanes = bytes / sizeof(T), rows = block_rows<bytes>, vectors = block_vectors<bytes>;
    int64_t j = 0;
    for (; j + vectors * lanes <= n; j += vectors * lanes) {
      column_panel<transposed, T, bytes, rows, vectors>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
    }
    for (; j + lanes <= n; j += lanes) {
      column_panel<transposed, T, bytes, rows, 1>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
    }
    if (j < n) {
      edge_panel<transposed, T, bytes, rows>(m, n - j, k, a, lda, b + j, ldb, c + j, ldc, accumulate);
    }
  }
};

}  // namespace

void portable_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc, bool accumulate) {
  widest<Tile<false, float>>(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

void portable_tile(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                   double* c, int64_t ldc, bool accumulate) {
  widest<Tile<false, double>>(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

void portable_transposed_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                              float* c, int64_t ldc, bool accumulate) {
  widest<Tile<true, float>>(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

void portable_transposed_tile(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
                              int64_t ldb, double* c, int64_t ldc, bool accumulate) {
  widest<Tile<true, double>>(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

}  // namespace growkernels
