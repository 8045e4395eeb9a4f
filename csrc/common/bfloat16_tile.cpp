#include "common/bfloat16_tile.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

#ifdef __x86_64__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace growkernels {
namespace {

using c10::BFloat16;

struct Product {
  int64_t m, n, k;
  const BFloat16* a;
  int64_t lda;
  const BFloat16* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  bool accumulate;
};

#ifdef __x86_64__

// --- AVX-512: dot products of pairs. A block of C (rows x vectors) stays in registers over all of k.

#define GK_AVX512 gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

constexpr int lanes = 16, block_rows = 8, block_vectors = 3;

template <int rows, int vectors>
[[GK_AVX512]] void dot_block(const Product& p, int64_t i, int64_t j, __mmask16 last) {
  __m512 sum[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = _mm512_setzero_ps();
    }
  }
  const BFloat16* a = p.a + i * p.lda;
  const BFloat16* b = p.b + 2 * j;
  for (int64_t q = 0; q < p.k; q += 2, a += 2, b += 2 * p.ldb) {
    __m512bh columns[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      columns[v] = reinterpret_cast<__m512bh>(
          _mm512_maskz_loadu_epi32(v + 1 == vectors ? last : __mmask16(0xffff), b + 2 * lanes * v));
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * p.lda, sizeof(pair));
      const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) {
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, columns[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      const __mmask16 mask = v + 1 == vectors ? last : __mmask16(0xffff);
      float* target = p.c + (i + r) * p.ldc + j + lanes * v;
      const __m512 old = p.accumulate ? _mm512_maskz_loadu_ps(mask, target) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(target, mask, _mm512_add_ps(old, sum[r][v]));
    }
  }
}

template <int vectors>
[[GK_AVX512]] void dot_panel(const Product& p, int64_t j, __mmask16 last) {
  int64_t i = 0;
  for (; i + block_rows <= p.m; i += block_rows) {
    dot_block<block_rows, vectors>(p, i, j, last);
  }
  for (; i + 2 <= p.m; i += 2) {
    dot_block<2, vectors>(p, i, j, last);
  }
  for (; i < p.m; ++i) {
    dot_block<1, vectors>(p, i, j, last);
  }
}

[[GK_AVX512]] void multiply_pairs(const Product& p) {
  for (int64_t j = 0; j < p.n; j += block_vectors * lanes) {
    const int64_t width = std::min<int64_t>(block_vectors * lanes, p.n - j), vectors = (width + lanes - 1) / lanes;
    const auto last = static_cast<__mmask16>(0xffff >> (vectors * lanes - width));
    vectors == 3 ? dot_panel<3>(p, j, last) : vectors == 2 ? dot_panel<2>(p, j, last) : dot_panel<1>(p, j, last);
  }
}

// --- AMX: registers of up to 16 rows of 64 bytes. Two by two of them hold a block of C; a step over 32 of k
// multiplies two of A by two of B.

#define GK_AMX gnu::target("amx-tile,amx-bf16")

constexpr int64_t tile = 16, block = 2 * tile, step = 32;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int index, int64_t row_count, int64_t bytes) {  // neither or both may be 0
    rows[index] = static_cast<uint8_t>(bytes == 0 ? 0 : row_count);
    row_bytes[index] = static_cast<uint16_t>(row_count == 0 ? 0 : bytes);
  }
};

// One block of C, of row_tiles x column_tiles registers 0 to 3. A's are 4 and 5, B's 6 and 7.
template <int row_tiles, int column_tiles>
[[GK_AMX]] void tile_block(const Product& p, int64_t i, int64_t j) {
  const int64_t c_bytes = p.ldc * sizeof(float), a_bytes = p.lda * sizeof(BFloat16), b_bytes = p.ldb * 4;
  float* const c = p.c + i * p.ldc + j;
  if (p.accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (column_tiles > 1) {
      _tile_loadd(1, c + tile, c_bytes);
    }
    if constexpr (row_tiles > 1) {
      _tile_loadd(2, c + tile * p.ldc, c_bytes);
    }
    if constexpr (row_tiles > 1 && column_tiles > 1) {
      _tile_loadd(3, c + tile * p.ldc + tile, c_bytes);
    }
  } else {
    _tile_zero(0);
    if constexpr (column_tiles > 1) {
      _tile_zero(1);
    }
    if constexpr (row_tiles > 1) {
      _tile_zero(2);
    }
    if constexpr (row_tiles > 1 && column_tiles > 1) {
      _tile_zero(3);
    }
  }
  const BFloat16* a = p.a + i * p.lda;
  const BFloat16* b = p.b + 2 * j;
  for (int64_t q = 0; q < p.k; q += step, a += step, b += step * p.ldb) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (column_tiles > 1) {
      _tile_loadd(7, b + 2 * tile, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (row_tiles > 1) {
      _tile_loadd(5, a + tile * p.lda, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (row_tiles > 1 && column_tiles > 1) {
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (column_tiles > 1) {
    _tile_stored(1, c + tile, c_bytes);
  }
  if constexpr (row_tiles > 1) {
    _tile_stored(2, c + tile * p.ldc, c_bytes);
  }
  if constexpr (row_tiles > 1 && column_tiles > 1) {
    _tile_stored(3, c + tile * p.ldc + tile, c_bytes);
  }
}

// The blocks of `height` rows in [first_row, last_row) and `width` columns in [first_column, last_column).
[[GK_AMX]] void equal_blocks(const Product& p, int64_t height, int64_t first_row, int64_t last_row, int64_t width,
                             int64_t first_column, int64_t last_column) {
  if (first_row == last_row || first_column == last_column) {
    return;
  }
  TileShapes shapes;
  const int64_t heights[2] = {std::min(tile, height), height - std::min(tile, height)};
  const int64_t widths[2] = {std::min(tile, width), width - std::min(tile, width)};
  for (int r = 0; r < 2; ++r) {
    for (int c = 0; c < 2; ++c) {
      shapes.set(2 * r + c, heights[r], widths[c] * 4);
    }
    shapes.set(4 + r, heights[r], 64);
    shapes.set(6 + r, tile, widths[r] * 4);
  }
  _tile_loadconfig(&shapes);
  const auto run = height > tile ? (width > tile ? tile_block<2, 2> : tile_block<2, 1>)
                                 : (width > tile ? tile_block<1, 2> : tile_block<1, 1>);
  for (int64_t i = first_row; i < last_row; i += height) {
    for (int64_t j = first_column; j < last_column; j += width) {
      run(p, i, j);
    }
  }
}

[[GK_AMX]] void multiply_tiles(const Product& p) {
  const int64_t rows = p.m / block * block, columns = p.n / block * block;
  equal_blocks(p, block, 0, rows, block, 0, columns);
  equal_blocks(p, block, 0, rows, p.n - columns, columns, p.n);
  equal_blocks(p, p.m - rows, rows, p.m, block, 0, columns);
  equal_blocks(p, p.m - rows, rows, p.m, p.n - columns, columns, p.n);
}

// Linux lends the registers' memory to a process that asks for it.
bool may_use_amx() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

Bfloat16Unit unit_of_cpu() {
  if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_amx()) {
    return Bfloat16Unit::Amx;
  }
  return __builtin_cpu_supports("avx512bf16") ? Bfloat16Unit::Avx512 : Bfloat16Unit::None;
}

#else

Bfloat16Unit unit_of_cpu() { return Bfloat16Unit::None; }

void multiply_tiles(const Product&) {}
void multiply_pairs(const Product&) {}

#endif

Bfloat16Unit wanted_unit() {
  constexpr const char* variable = "GROWKERNELS_BFLOAT16_TILES";
  const char* const value = std::getenv(variable);
  const std::string_view name = value == nullptr ? "amx" : value;
  TORCH_CHECK_VALUE(name == "amx" || name == "avx512" || name == "none", variable, " is '", name,
                    "'; use 'amx', 'avx512' or 'none'");
  return name == "amx" ? Bfloat16Unit::Amx : name == "avx512" ? Bfloat16Unit::Avx512 : Bfloat16Unit::None;
}

bool torch_is_limited() {
  const char* const value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view name = value == nullptr ? "" : value;
  return name == "default" || name == "avx2";
}

}  // namespace

Bfloat16Unit bfloat16_unit() {
  static const Bfloat16Unit unit = std::min(wanted_unit(), torch_is_limited() ? Bfloat16Unit::None : unit_of_cpu());
  return unit;
}

const char* bfloat16_tiles_obstacle(c10::ScalarType dtype) {
  if (dtype != c10::ScalarType::BFloat16) {
    return "they are for bfloat16";
  }
  if (bfloat16_unit() != Bfloat16Unit::None) {
    return nullptr;
  }
  if (torch_is_limited()) {
    return "ATEN_CPU_CAPABILITY keeps torch from AVX-512";
  }
  return wanted_unit() == Bfloat16Unit::None ? "GROWKERNELS_BFLOAT16_TILES=none" : "this CPU has none";
}

int64_t bfloat16_step() { return bfloat16_unit() == Bfloat16Unit::Amx ? 32 : 2; }

void bfloat16_tile(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t ldb,
                   float* c, int64_t ldc, bool accumulate) {
  const Product product{m, n, k, a, lda, b, ldb, c, ldc, accumulate};
  bfloat16_unit() == Bfloat16Unit::Amx ? multiply_tiles(product) : multiply_pairs(product);
}

void release_bfloat16_tiles() {
#ifdef __x86_64__
  if (bfloat16_unit() == Bfloat16Unit::Amx) {
    [] __attribute__((target("amx-tile"))) () { _tile_release(); }();
  }
#endif
}

}  // namespace growkernels
