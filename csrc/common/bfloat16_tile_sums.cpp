#include "common/bfloat16_tile_sums.h"

#include <algorithm>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace growkernels {

#ifdef __x86_64__

namespace {

using c10::BFloat16;

// --- AMX: registers 0 to 3 hold C, 4 and 5 tiles of A, 6 and 7 tiles of B.

#define GK_AMX gnu::target("amx-tile,amx-bf16")

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes whole_tiles;  // in memory: the compiler does not see that the instruction reads all of it

[[GK_AMX]] void configure() { _tile_loadconfig(&whole_tiles); }

template <int row_tiles, int column_tiles>
[[GK_AMX]] void amx_sum(const TileSum& s) {
  constexpr bool two_rows = row_tiles > 1, two_columns = column_tiles > 1;
  const int64_t c_bytes = s.ldc * sizeof(float);
  float* const below = s.c + packed_rows * s.ldc;
  if (s.accumulate) {
    _tile_loadd(0, s.c, c_bytes);
    if constexpr (two_columns) {
      _tile_loadd(1, s.c + packed_columns, c_bytes);
    }
    if constexpr (two_rows) {
      _tile_loadd(2, below, c_bytes);
    }
    if constexpr (two_rows && two_columns) {
      _tile_loadd(3, below + packed_columns, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < s.count; ++i) {
    const BFloat16* a = s.a + s.a_offsets[i];
    const BFloat16* b = s.b + s.b_offsets[i];
    for (int64_t j = 0; j < s.depth; ++j, a += s.a_step, b += s.b_step) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (two_columns) {
        _tile_loadd(7, b + s.b_next, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (two_rows) {
        _tile_loadd(5, a + s.a_next, 64);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (two_rows && two_columns) {
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, s.c, c_bytes);
  if constexpr (two_columns) {
    _tile_stored(1, s.c + packed_columns, c_bytes);
  }
  if constexpr (two_rows) {
    _tile_stored(2, below, c_bytes);
  }
  if constexpr (two_rows && two_columns) {
    _tile_stored(3, below + packed_columns, c_bytes);
  }
}

// --- AVX-512: dot products of pairs, eight rows of C at a time.

#define GK_AVX512 gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

template <int column_tiles>
[[GK_AVX512]] void avx512_sum(const TileSum& s, const BFloat16* a_rows, float* c) {
  constexpr int rows = 8;
  __m512 sum[rows][column_tiles];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < column_tiles; ++v) {
      sum[r][v] = s.accumulate ? _mm512_loadu_ps(c + r * s.ldc + v * packed_columns) : _mm512_setzero_ps();
    }
  }
  for (int64_t i = 0; i < s.count; ++i) {
    for (int64_t j = 0; j < s.depth; ++j) {
      const BFloat16* const a = a_rows + s.a_offsets[i] + j * s.a_step;
      const BFloat16* const b = s.b + s.b_offsets[i] + j * s.b_step;
      for (int64_t pair = 0; pair < packed_depth / 2; ++pair) {
        __m512bh columns[column_tiles];
#pragma GCC unroll 2
        for (int v = 0; v < column_tiles; ++v) {
          columns[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * s.b_next + pair * 2 * packed_columns));
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          int32_t both;
          std::memcpy(&both, a + r * packed_depth + 2 * pair, sizeof(both));
          const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 2
          for (int v = 0; v < column_tiles; ++v) {
            sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, columns[v]);
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < column_tiles; ++v) {
      _mm512_storeu_ps(c + r * s.ldc + v * packed_columns, sum[r][v]);
    }
  }
}

void avx512_sums(int64_t row_tiles, int64_t column_tiles, const TileSum& s) {
  const auto run = column_tiles > 1 ? avx512_sum<2> : avx512_sum<1>;
  for (int64_t r = 0; r < row_tiles; ++r) {
    float* const c = s.c + r * packed_rows * s.ldc;
    run(s, s.a + r * s.a_next, c);
    run(s, s.a + r * s.a_next + 8 * packed_depth, c + 8 * s.ldc);
  }
}

}  // namespace

#endif

TileSums::TileSums() : unit_(bfloat16_unit()) {
#ifdef __x86_64__
  if (unit_ == Bfloat16Unit::Amx) {
    configure();
  }
#endif
}

TileSums::~TileSums() { release_bfloat16_tiles(); }

void TileSums::add([[maybe_unused]] int64_t row_tiles, [[maybe_unused]] int64_t column_tiles,
                   [[maybe_unused]] const TileSum& sum) const {
#ifdef __x86_64__
  if (unit_ != Bfloat16Unit::Amx) {
    avx512_sums(row_tiles, column_tiles, sum);
  } else if (row_tiles > 1) {
    column_tiles > 1 ? amx_sum<2, 2>(sum) : amx_sum<2, 1>(sum);
  } else {
    column_tiles > 1 ? amx_sum<1, 2>(sum) : amx_sum<1, 1>(sum);
  }
#endif
}

}  // namespace growkernels
