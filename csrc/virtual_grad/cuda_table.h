#pragma once
// What the kernels of one launch are told, as the launch's only parameter: no copy to the device, nothing
// to wait for, and a CUDA graph keeps it. Longer lists of positions take several launches.

#include "virtual_grad/kind.h"

#include <cstdint>

namespace growkernels::virtual_grad::cuda {

struct Position {
  const void *h, *g;  // [samples, width], rows contiguous
  void* gradient;     // [width, width], or null
  int64_t h_stride, g_stride, samples;
  int width, index;  // index: in the caller's list
  int tiles_across, tiles;
  int splits, steps;  // ranges that the samples are cut into, steps of the tile's depth in each
  // Where the position's share begins: of the blocks that multiply, of those that add splits up, of the
  // partial sums (tiles), and of the sums of squares.
  int first_block, first_sum_block, first_partial, first_square;
  int squares;                // sums of squares that the position's norm consists of
  bool h_vectors, g_vectors;  // rows begin at multiples of 16 bytes
};

struct Squares {
  double sums, batch;  // of the buffers after this batch was added; of this batch alone
};

struct Table {
  static constexpr int capacity = 36;

  Position positions[capacity];
  int count;
  bool mask_tile;  // shared memory has room for the mask's own tile
  Layer layer;
  Activation activation;
  Store store;
  float scale;
  float* partials;
  Squares* squares;
  float* norms;           // null where none are wanted
  float* second_moments;  // or null
  int64_t second_moments_stride;
};

// Kernel parameters may take 4 KiB on every GPU and driver.
static_assert(sizeof(Table) <= 4096);

}  // namespace growkernels::virtual_grad::cuda
