#pragma once
// Sums of products of packed bfloat16 tiles, which stay in registers until they are complete: what a convolution is
// over its taps and channels. All tiles are whole and 1 KiB of memory, so AMX's registers are configured once:
//   of A  [16 rows][32 of k]
//   of B  [16 pairs of k][16 columns][2]

#include "common/bfloat16_tile.h"

namespace growkernels {

constexpr int64_t packed_rows = 16, packed_columns = 16, packed_depth = 32;
constexpr int64_t packed_tile = packed_rows * packed_depth;  // elements

// C[16 row_tiles, 16 column_tiles] (+)= sum over i < count and j < depth of A_ij B_ij, row-major, `ldc` apart.
// Tile r of A_ij begins at a + a_offsets[i] + j * a_step + r * a_next, tile c of B_ij likewise.
struct TileSum {
  int64_t count, depth;
  const c10::BFloat16* a;
  const int64_t* a_offsets;
  int64_t a_step, a_next;
  const c10::BFloat16* b;
  const int64_t* b_offsets;
  int64_t b_step, b_next;
  float* c;
  int64_t ldc;
  bool accumulate;
};

// A thread's series of such sums, between which it multiplies nothing else. Not for Bfloat16Unit::None.
class TileSums {
 public:
  TileSums();
  ~TileSums();
  TileSums(const TileSums&) = delete;
  TileSums& operator=(const TileSums&) = delete;

  // One or two tiles of rows and of columns.
  void add(int64_t row_tiles, int64_t column_tiles, const TileSum& sum) const;

 private:
  Bfloat16Unit unit_;
};

}  // namespace growkernels
