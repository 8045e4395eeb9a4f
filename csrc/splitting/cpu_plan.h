#pragma once
// The problem both ops reduce to on the CPU, and how its work is cut into items for threads.

#include "splitting/splitting.h"

#include <cstdint>
#include <vector>

namespace growkernels::splitting {

// Row m of the problem is what the filter sees at one position of one image, taps outermost, channels
// innermost. A linear layer is the case of one image of M positions and a filter of one tap.
struct Problem {
  at::Tensor x;  // [N, C, H, W], or [N, C, 1, pixels] for a filter of one tap
  at::Tensor w;  // [N, n, pixels]
  at::Tensor v;  // [n, k, taps * C] contiguous
  int64_t kernel_height = 1, kernel_width = 1, out_width = 1;
  Sliding sliding{{1, 1}, {0, 0}, {1, 1}};

  int64_t neurons() const { return v.size(0); }
  int64_t vectors_per_neuron() const { return v.size(1); }
  int64_t vectors() const { return neurons() * vectors_per_neuron(); }
  int64_t width() const { return v.size(2); }
  int64_t pixels() const { return w.size(2); }
  int64_t rows() const { return w.size(0) * pixels(); }
  bool one_tap() const {  // rows are pixels
    return kernel_height == 1 && kernel_width == 1 && sliding.stride == std::array<int64_t, 2>{1, 1} &&
           sliding.padding == std::array<int64_t, 2>{0, 0};
  }
};

// Neurons whose sums one thread works on at a time, over one range of the rows.
struct Item {
  int64_t range, index, begin, end;
};

struct Range {
  int64_t begin, end;  // neurons
  int64_t items;       // ranges of rows that their sums are cut into
};

struct Plan {
  int64_t rows_per_block = 0;     // held in L2 while they meet all vectors of an item
  int64_t neurons_per_tile = 0;   // whose products with those rows are in L2 at a time
  int64_t columns_per_chunk = 0;  // of the rows that one product sums over
  std::vector<Range> ranges;
  std::vector<Item> items;
  bool parallel = false;
};

Plan make_plan(const Problem& problem);

// Why a linear layer's products in this dtype are not by bfloat16 tiles; null where they are.
const char* tiles_obstacle(at::ScalarType dtype, bool full_precision);

// Why its products are not the vendor's, with P in memory; null where they are.
const char* vendor_obstacle(const Hvp& call);

}  // namespace growkernels::splitting
