#include "convolution/tile_packing.h"

#include <cstring>

namespace growkernels::convolution {
namespace {

using at::BFloat16;

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pairs of neighbours as one element: of column m, the pair i.
struct Pairs {
  using Element = uint32_t;
  using Out = uint32_t;
  const BFloat16* data;
  int64_t column_stride;
  [[gnu::always_inline]] inline Element operator()(int64_t m, int64_t i) const {
    Element pair;
    std::memcpy(&pair, data + m * column_stride + 2 * i, sizeof(pair));
    return pair;
  }
  [[gnu::always_inline]] static inline Out out(Element x) { return x; }
};

// One tile; of k and of the columns there are so many.
void pack_tile(const BFloat16* data, int64_t depth, int64_t depth_stride, int64_t columns, int64_t column_stride,
               BFloat16* out) {
  using Pair [[gnu::may_alias]] = uint32_t;
  Pair* const pairs = reinterpret_cast<Pair*>(out);
  if (depth == packed_depth && columns == packed_columns && depth_stride == 1) {
    widest<Transpose<Pairs>>(Pairs{data, column_stride}, packed_columns, packed_columns, packed_depth / 2,
                             reinterpret_cast<uint32_t*>(out));
    return;
  }
  for (int64_t pair = 0; pair < packed_depth / 2; ++pair) {
    const BFloat16* const even = data + 2 * pair * depth_stride;
    const BFloat16* const odd = even + depth_stride;
    if (2 * pair + 1 < depth && columns == packed_columns && column_stride == 1) {
      for (int64_t column = 0; column < packed_columns; ++column) {
        pairs[pair * packed_columns + column] = uint32_t{even[column].x} | uint32_t{odd[column].x} << 16;
      }
      continue;
    }
    for (int64_t column = 0; column < packed_columns; ++column) {
      const bool inside = column < columns;
      const uint32_t low = inside && 2 * pair < depth ? even[column * column_stride].x : 0;
      const uint32_t high = inside && 2 * pair + 1 < depth ? odd[column * column_stride].x : 0;
      pairs[pair * packed_columns + column] = low | high << 16;
    }
  }
}

}  // namespace

int64_t packed_matrix_size(int64_t depth, int64_t columns) {
  return divided(columns, 2 * packed_columns) * divided(depth, packed_depth) * 2 * packed_tile;
}

void pack_matrix(const BFloat16* data, int64_t depth, int64_t depth_stride, int64_t columns, int64_t column_stride,
                 int64_t next, BFloat16* out) {
  for (int64_t column = 0; column < columns; column += 2 * packed_columns, out += next) {
    BFloat16* target = out;
    for (int64_t k = 0; k < depth; k += packed_depth) {
      for (int64_t tile = 0; tile < 2; ++tile, target += packed_tile) {
        const int64_t first = column + tile * packed_columns;
        const int64_t count = std::clamp<int64_t>(columns - first, 0, packed_columns);
        pack_tile(data + k * depth_stride + (count > 0 ? first * column_stride : 0), std::min(packed_depth, depth - k),
                  depth_stride, count, column_stride, target);
      }
    }
  }
}

}  // namespace growkernels::convolution
