#include "common/portable_tile.h"

#include "common/vector_width.h"

#include <algorithm>
#include <type_traits>

namespace growkernels {
namespace {

// Element (i, p) of A, which is stored [m, k], or [k, m] when transposed.
template <bool transposed, typename T>
[[gnu::always_inline]] inline const T* element(const T* a, int64_t lda, int64_t i, int64_t p) {
  return transposed ? a + p * lda + i : a + i * lda + p;
}

// Numbers of lanes, as wide as the lanes.
template <typename T>
using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <typename T, int bytes>
using Index [[gnu::vector_size(bytes)]] = Integer<T>;

// B's rows are too far apart for the hardware to foresee.
constexpr int64_t rows_ahead = 4;

// A register block of C (rows x vectors) stays in registers over all of k: the outer-product form of
// Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008). No packing: the
// callers' tiles are cache-sized already. Of a `partial` one, the first `done` columns keep what they
// hold.
template <bool transposed, bool partial, typename T, int bytes, int rows, int vectors>
[[gnu::always_inline]] inline void register_block(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                                                  int64_t ldc, bool accumulate, Integer<T> done) {
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
  Index<T, bytes> lane_of;
  for (int lane = 0; lane < lanes; ++lane) {
    lane_of[lane] = lane;
  }
  const auto keep = lane_of < done;
  for (int64_t p = 0; p < k; ++p) {
    V b_values[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      __builtin_prefetch(b + (p + rows_ahead) * ldb + j * lanes);
      b_values[j] = *reinterpret_cast<const V*>(b + p * ldb + j * lanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const T a_value = *element<transposed>(a, lda, i, p);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        sum[i][j] += a_value * b_values[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      V& target = *reinterpret_cast<V*>(c + i * ldc + j * lanes);
      const V value = accumulate ? target + sum[i][j] : sum[i][j];  // at the end, for shorter chains of roundings
      target = partial && j == 0 ? (keep ? target : value) : value;
    }
  }
}

// All rows of a panel of C that is `vectors` vectors wide.
template <bool transposed, bool partial, typename T, int rows, int vectors>
struct Panel {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(int64_t m, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                                                T* c, int64_t ldc, bool accumulate, Integer<T> done) {
    int64_t i = 0;
    for (; i + rows <= m; i += rows) {
      register_block<transposed, partial, T, bytes, rows, vectors>(k, element<transposed>(a, lda, i, 0), lda, b, ldb,
                                                                   c + i * ldc, ldc, accumulate, done);
    }
    for (; i + 4 <= m; i += 4) {
      register_block<transposed, partial, T, bytes, 4, vectors>(k, element<transposed>(a, lda, i, 0), lda, b, ldb,
                                                                c + i * ldc, ldc, accumulate, done);
    }
    for (; i + 2 <= m; i += 2) {
      register_block<transposed, partial, T, bytes, 2, vectors>(k, element<transposed>(a, lda, i, 0), lda, b, ldb,
                                                                c + i * ldc, ldc, accumulate, done);
    }
    for (; i < m; ++i) {
      register_block<transposed, partial, T, bytes, 1, vectors>(k, element<transposed>(a, lda, i, 0), lda, b, ldb,
                                                                c + i * ldc, ldc, accumulate, done);
    }
  }
};

// Fewer columns than a register has lanes: on a copy of C padded to a vector. B is read in whole registers, with what
// lies behind its rows in lanes of no meaning; its last rows, behind which nothing may lie, are copied.
template <bool transposed, typename T, int bytes, int rows>
[[gnu::always_inline]] inline void narrow_panel(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                                                int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int lanes = bytes / sizeof(T);
  T b_padded[lanes * lanes] = {};
  T c_padded[rows * lanes];
  // Registers of the rows before these end within the last row; where all rows are one, there are none before.
  const int64_t last = ldb > 0 ? (lanes - n + ldb - 1) / ldb : k;
  const int64_t in_place = last < lanes ? std::max<int64_t>(k - last, 0) : 0;
  for (int64_t p = 0; p < k;) {
    const int64_t depth = p < in_place ? in_place : std::min<int64_t>(lanes, k - p);
    const T* operand = b;
    int64_t stride = ldb;
    if (p >= in_place) {
      for (int64_t q = 0; q < depth; ++q) {
        std::copy_n(b + (p + q) * ldb, n, b_padded + q * lanes);
      }
      operand = b_padded;
      stride = lanes;
    }
    for (int64_t i = 0; i < m; i += rows) {
      const int64_t height = std::min<int64_t>(rows, m - i);
      apart<bytes, Panel<transposed, false, T, rows, 1>>(height, depth, element<transposed>(a, lda, i, p), lda, operand,
                                                         stride, static_cast<T*>(c_padded), int64_t{lanes}, false,
                                                         Integer<T>{0});
      for (int64_t r = 0; r < height; ++r) {
        for (int64_t j = 0; j < n; ++j) {
          T& target = c[(i + r) * ldc + j];
          target = accumulate || p > 0 ? target + c_padded[r * lanes + j] : c_padded[r * lanes + j];
        }
      }
    }
    p += depth;
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
    constexpr int lanes = bytes / sizeof(T), rows = block_rows<bytes>, most = block_vectors<bytes>;
    if (n < lanes) {
      narrow_panel<transposed, T, bytes, rows>(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
      return;
    }
    for (int64_t j = 0; j < n;) {  // panels of about equal widths; the last one begins in columns that are done
      const int64_t left = (n - j + lanes - 1) / lanes, panels = (left + most - 1) / most;
      int64_t vectors = (left + panels - 1) / panels;
      if (j == 0 && vectors * lanes > n) {
        --vectors;
      }
      const int64_t first = std::min(j, n - vectors * lanes);
      const auto panel = [&](auto width) __attribute__((always_inline)) {
        constexpr int wide = decltype(width)::value;
        if (first == j) {
          apart<bytes, Panel<transposed, false, T, rows, wide>>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate,
                                                                Integer<T>{0});
        } else {
          apart<bytes, Panel<transposed, true, T, rows, wide>>(m, k, a, lda, b + first, ldb, c + first, ldc, accumulate,
                                                               static_cast<Integer<T>>(j - first));
        }
      };
      if constexpr (most > 2) {
        if (vectors == 3) {
          panel(std::integral_constant<int, 3>());
        }
      }
      if (vectors == 2) {
        panel(std::integral_constant<int, 2>());
      } else if (vectors == 1) {
        panel(std::integral_constant<int, 1>());
      }
      j = first + vectors * lanes;
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
