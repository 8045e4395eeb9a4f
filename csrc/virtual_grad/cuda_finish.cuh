#pragma once
// From sums of products to results: G is stored or added to its buffer, and squares are summed in a fixed
// order, first in a thread, then over the block, then over the blocks of a position.

#include "common/warp.cuh"
#include "virtual_grad/cuda_table.h"
#include "virtual_grad/cuda_tile.cuh"

namespace growkernels::virtual_grad::cuda {

// The position whose share, counted from `first`, contains this block.
__device__ inline const Position& find_position(const Table& table, int Position::* first) {
  int p = 0;
  while (p + 1 < table.count && static_cast<int>(blockIdx.x) >= table.positions[p + 1].*first) {
    ++p;
  }
  return table.positions[p];
}

// The sum over the block, in thread 0; all threads must call it.
template <int threads>
__device__ Squares sum_over_block(Squares mine) {
  __shared__ Squares warps[threads / 32];
  growkernels::cuda::take_warp_sums(mine.sums, mine.batch);
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = mine;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < threads / 32; ++warp) {
      mine.sums += warps[warp].sums;
      mine.batch += warps[warp].batch;
    }
  }
  return mine;
}

__device__ inline void write_norm(const Table& table, const Position& position, const Squares& squares) {
  table.norms[position.index] = static_cast<float>(squares.sums);
  if (table.second_moments != nullptr) {
    table.second_moments[position.index * table.second_moments_stride] += static_cast<float>(squares.batch);
  }
}

// Takes `count` values of each thread of the block: value(v) is the tile's element first + v of the thread.
template <typename Tile, int count, int threads, typename Value>
__device__ void finish(const Table& table, const Position& position, int tile, int first, int square, Value value) {
  const int row = tile / position.tiles_across * Tile::rows, column = tile % position.tiles_across * Tile::columns;
  float sums = 0, batch = 0;
#pragma unroll
  for (int v = 0; v < count; ++v) {
    const int i = row + Tile::row_of(first + v), j = column + Tile::column_of(first + v);
    if (i < position.width && j < position.width) {
      float x = value(v);
      batch += x * x;
      if (table.store != Store::Nothing) {
        float* target = static_cast<float*>(position.gradient) + static_cast<int64_t>(i) * position.width + j;
        if (table.store == Store::Accumulate) {
          x += *target;
        }
        *target = x;
      }
      sums += x * x;
    }
  }
  if (table.norms == nullptr) {
    return;
  }
  const Squares total = sum_over_block<threads>({sums, batch});
  if (threadIdx.x == 0) {
    if (position.squares == 1) {
      write_norm(table, position, total);
    } else {
      table.squares[position.first_square + square] = total;
    }
  }
}

// Adds up the splits of each tile, in their order.
template <typename Tile>
__global__ void __launch_bounds__(Tile::threads) sum_splits(const __grid_constant__ Table table) {
  constexpr int count = Tile::values_per_sum_block, pieces = Tile::values / count;
  const Position& position = find_position(table, &Position::first_sum_block);
  const int block = blockIdx.x - position.first_sum_block, tile = block / pieces, piece = block % pieces;
  const int64_t elements = Tile::rows * Tile::columns;
  const float* partial = table.partials + (static_cast<int64_t>(position.first_partial) + tile) * elements +
                         piece * count * Tile::threads + threadIdx.x;
  float sums[count] = {};
#pragma unroll 8
  for (int split = 0; split < position.splits; ++split) {
#pragma unroll
    for (int v = 0; v < count; ++v) {
      sums[v] += partial[v * Tile::threads];
    }
    partial += position.tiles * elements;
  }
  finish<Tile, count, Tile::threads>(table, position, tile, piece * count, block, [&](int v) { return sums[v]; });
}

// The norms of positions that several blocks worked on: one block each.
template <int threads>
__global__ void __launch_bounds__(threads) sum_norms(const __grid_constant__ Table table) {
  const Position& position = table.positions[blockIdx.x];
  if (position.squares == 1) {
    return;
  }
  Squares mine{0, 0};
  for (int i = threadIdx.x; i < position.squares; i += threads) {
    const Squares& other = table.squares[position.first_square + i];
    mine.sums += other.sums;
    mine.batch += other.batch;
  }
  const Squares total = sum_over_block<threads>(mine);
  if (threadIdx.x == 0) {
    write_norm(table, position, total);
  }
}

}  // namespace growkernels::virtual_grad::cuda
