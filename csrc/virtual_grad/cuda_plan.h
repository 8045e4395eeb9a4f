#pragma once
// How a call's positions are divided among blocks, decided on the host from shapes alone.

#include "virtual_grad/cuda_table.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace growkernels::virtual_grad::cuda {

// Features for which blocks, tiles and their sums are still counted in 32 bits; G would take 256 GiB.
constexpr int64_t widest = 1 << 18;

// One entry of a call's lists.
struct Input {
  const void *h, *g;
  void* gradient;
  int64_t h_stride, g_stride, samples;  // strides in elements
  int width;
};

// All that is asked for at once.
struct Call {
  std::vector<Input> inputs;
  Kind kind;
  Store store;
  float* norms;           // null where none are wanted
  float* second_moments;  // or null
  int64_t second_moments_stride;
};

// What planning must know of a kind of tile.
struct TileShape {
  int rows, columns, depth, sum_blocks;  // sum_blocks: that add up the splits of a tile
  int blocks;                            // resident on a multiprocessor at a time
  double rate;                           // of multiplying, relative to the other tiles of the dtype
};

struct Plan {
  std::vector<Position> positions;
  int64_t partials = 0;  // tiles
  int squares = 0;
  double cost = 0;
};

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Positions cut into tiles, without splits.
inline std::vector<Position> tiled(const std::vector<Input>& inputs, const std::vector<int>& chosen,
                                   const TileShape& shape) {
  std::vector<Position> positions;
  for (const int index : chosen) {
    const Input& in = inputs[index];
    Position p{};
    p.h = in.h;
    p.g = in.g;
    p.gradient = in.gradient;
    p.h_stride = in.h_stride;
    p.g_stride = in.g_stride;
    p.samples = in.samples;
    p.width = in.width;
    p.index = index;
    p.tiles_across = ceil_div(in.width, shape.columns);
    p.tiles = p.tiles_across * ceil_div(in.width, shape.rows);
    positions.push_back(p);
  }
  return positions;
}

inline void split(Position& p, const TileShape& shape, int longest) {
  const int steps = std::max(1, ceil_div(p.samples, shape.depth));
  p.splits = ceil_div(steps, longest);
  p.steps = ceil_div(steps, p.splits);
  p.splits = ceil_div(steps, p.steps);
}

// The time of all blocks, in products of a multiprocessor that multiplies at rate 1: they run in waves as
// long as the longest block, and those on one multiprocessor share it. A block's start and end cost as
// much as some steps, and so does a tile of partial sums that is written and read again.
inline double predicted_cost(const std::vector<Position>& positions, const TileShape& shape, int multiprocessors) {
  constexpr double begin_and_end = 6, partial = 10;
  double total = 0, longest = 0;
  for (const Position& p : positions) {
    const double block = p.steps + begin_and_end + (p.splits > 1 ? partial : 0.0);
    total += block * p.tiles * p.splits;
    longest = p.tiles > 0 ? std::max(longest, block) : longest;
  }
  if (total == 0) {
    return 0;
  }
  const double blocks = total / longest;  // of equal length
  const double together = std::clamp(std::ceil(blocks / multiprocessors), 1.0, static_cast<double>(shape.blocks));
  const double waves = std::ceil(blocks / (multiprocessors * together));
  return waves * together * longest * shape.rows * shape.columns * shape.depth / shape.rate;
}

// Splits with the lowest predicted cost. Those of all positions are about equally long.
inline Plan make_plan(const std::vector<Input>& inputs, const std::vector<int>& chosen, const TileShape& shape,
                      int multiprocessors) {
  constexpr int shortest = 8, longest_countable = 1 << 24;  // a block counts its samples in 32 bits
  Plan plan;
  plan.positions = tiled(inputs, chosen, shape);
  int most_steps = 1;
  int64_t tiles = 0;
  for (const Position& p : plan.positions) {
    most_steps = std::max(most_steps, ceil_div(p.samples, shape.depth));
    tiles += p.tiles;
  }
  std::vector<int64_t> tried = {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128};
  for (const int64_t waves : {1, 2, 3, 4}) {  // that are full
    tried.push_back(waves * multiprocessors * shape.blocks / std::max<int64_t>(tiles, 1));
  }
  int best = most_steps;
  plan.cost = std::numeric_limits<double>::infinity();
  for (const int64_t splits : tried) {
    const int longest = ceil_div(most_steps, std::clamp<int64_t>(splits, 1, 128));
    if (splits > 1 && longest < shortest) {
      continue;
    }
    for (Position& p : plan.positions) {
      split(p, shape, longest);
    }
    const double cost = predicted_cost(plan.positions, shape, multiprocessors);
    if (cost < plan.cost) {
      plan.cost = cost;
      best = longest;
    }
  }
  for (Position& p : plan.positions) {
    split(p, shape, std::min(best, longest_countable));
    p.squares = p.splits > 1 ? p.tiles * shape.sum_blocks : p.tiles;
    p.first_partial = static_cast<int>(plan.partials);
    p.first_square = plan.squares;
    plan.partials += p.splits > 1 ? static_cast<int64_t>(p.tiles) * p.splits : 0;
    plan.squares += p.squares;
  }
  return plan;
}

}  // namespace growkernels::virtual_grad::cuda
