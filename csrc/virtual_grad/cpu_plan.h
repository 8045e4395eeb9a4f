#pragma once
// How the work of one call is cut into pieces that threads take from one queue.

#include "virtual_grad/kind.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace growkernels::virtual_grad {

struct Position {
  at::Tensor h, g;           // [samples, width] and [samples, height], rows contiguous
  void* gradient = nullptr;  // [height, width]
  int64_t samples = 0, width = 0, height = 0;
  bool rounded = false;  // float32 that is multiplied as bfloat16
  bool vendors = false;  // by the vendor's product
};

struct Tile {
  int64_t position, row, rows, column, columns;
  bool upright;   // its sum is kept transposed, [columns, rows]: it has fewer columns than a register
  int64_t items;  // ranges of samples that the sum is cut into
  double squares = 0, batch_squares = 0;
};

struct Item {
  int64_t tile, index, begin, end;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Item> items;
  bool parallel = false;
};

// Samples that one product sums over: the widest operand's chunk stays well inside L2, beside a narrow one in L1.
int64_t chunk_of(const Position& position);

// Why bfloat16 tiles do not compute a gradient [height, width]; null where they do.
const char* tiles_obstacle(at::ScalarType dtype, int64_t height, int64_t width);

// Why the vendor's product does not compute a gradient [height, width]; null where it does.
const char* vendor_obstacle(at::ScalarType dtype, const Kind& kind, int64_t height, int64_t width);

Plan make_plan(const std::vector<Position>& positions);

}  // namespace growkernels::virtual_grad
