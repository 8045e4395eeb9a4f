#pragma once
// G = (masked gradient)^T (activated input), tile by tile: a block sums one tile over one range of samples.
//
// Steps of `depth` samples pass through a ring of stages in shared memory. In every turn of the loop a
// stage is being filled from global memory, the stage that arrived last is masked or activated in place,
// and the one before it is multiplied; one barrier a turn separates them. So a sample is transformed once
// a block, not once for every warp that reads it.

#include "common/cuda_activation.cuh"
#include "common/cuda_instructions.cuh"
#include "common/dynamic_shared.cuh"
#include "virtual_grad/cuda_finish.cuh"
#include "virtual_grad/cuda_table.h"
#include "virtual_grad/cuda_tile.cuh"

namespace growkernels::virtual_grad::cuda {

using growkernels::cuda::activate;
using growkernels::cuda::Chunk;
using growkernels::cuda::read_chunk;
using growkernels::cuda::thread_read_anew;
using growkernels::cuda::with_activation;
using growkernels::cuda::write_chunk;

// A stage: the gradient's rows and the input's columns of G, and the mask where the input of the
// gradient's rows is not among the columns.
template <typename Tile>
constexpr int stage_elements(bool mask_tile) {
  return Tile::depth * (Tile::rows * (mask_tile ? 2 : 1) + Tile::columns);
}

// Where chunk c of a sample lies in an operand of `width` elements a sample.
template <typename Tile, int width>
__device__ int place_of(int sample, int c) {
  return sample * width + (c ^ Tile::swizzle(sample)) * Chunk<typename Tile::Element>::size;
}

// Calls f(sample, chunk, its place) for this thread's chunks of an operand.
template <typename Tile, int width, typename F>
__device__ void for_each_chunk(F f) {
  constexpr int chunks = width / Chunk<typename Tile::Element>::size, samples = Tile::threads / chunks;
  static_assert(Tile::threads % chunks == 0 && samples % Tile::swizzle_period == 0);
  const int thread = thread_read_anew();
  const int first = thread / chunks, c = thread % chunks;
  int place = place_of<Tile, width>(first, c);
#pragma unroll 1
  for (int m = first; m < Tile::depth; m += samples) {
    f(m, c, place);
    place += samples * width;
  }
}

// Starts to fill an operand with [samples, columns] of a matrix, zeros beyond.
template <typename Tile, int width>
__device__ void load(typename Tile::Element* shared, const void* matrix, int64_t stride, int64_t first_sample,
                     int samples, int first_column, int columns, bool vectors) {
  using Element = typename Tile::Element;
  constexpr int chunk = Chunk<Element>::size;
  const Element* corner = static_cast<const Element*>(matrix) + first_sample * stride + first_column;
  for_each_chunk<Tile, width>([&](int sample, int c, int place) {
    Element* target = shared + place;
    const int valid = sample < samples ? min(max(columns - c * chunk, 0), chunk) : 0;
    const Element* source = valid > 0 ? corner + sample * stride + c * chunk : corner;
    if (vectors) {
      growkernels::cuda::copy_async(target, source, valid * static_cast<int>(sizeof(Element)));
    } else {
      Chunk<Element> loaded;
#pragma unroll
      for (int e = 0; e < chunk; ++e) {
        loaded.values[e] = e < valid ? source[e] : Element{};
      }
      write_chunk(target, __builtin_bit_cast(uint4, loaded));
    }
  });
}

template <typename Tile>
struct Product {
  using Element = typename Tile::Element;
  static constexpr int chunk = Chunk<Element>::size;

  const Table& table;
  const Position& position;
  int row, column;  // of the tile's corner in G
  int64_t begin;    // first sample
  int count;        // samples
  bool mask_among_columns;

  __device__ Element* stage(int step) const {
    return dynamic_shared<Element>() + step % Tile::stages * stage_elements<Tile>(table.mask_tile);
  }
  __device__ Element* columns_of(Element* stage) const { return stage + Tile::depth * Tile::rows; }
  __device__ Element* mask_of(Element* stage) const { return columns_of(stage) + Tile::depth * Tile::columns; }

  __device__ void load_step(int step) const {
    const int64_t first = begin + static_cast<int64_t>(step) * Tile::depth;
    const int samples = count - step * Tile::depth;
    const int rows = position.width - row, columns = position.width - column;
    Element* to = stage(step);
    load<Tile, Tile::rows>(to, position.g, position.g_stride, first, samples, row, rows, position.g_vectors);
    load<Tile, Tile::columns>(columns_of(to), position.h, position.h_stride, first, samples, column, columns,
                              position.h_vectors);
    if (table.layer == Layer::LinearRelu && !mask_among_columns) {
      load<Tile, Tile::rows>(mask_of(to), position.h, position.h_stride, first, samples, row, rows, position.h_vectors);
    }
  }

  __device__ void transform_step(int step) const {
    Element* at = stage(step);
    if (table.layer == Layer::Residual) {
      with_activation(table.activation, [&]<Activation activation>() { activate_columns<activation>(columns_of(at)); });
    } else if (mask_among_columns) {
      mask_rows<Tile::columns>(at, columns_of(at), (row - column) / chunk);
    } else {
      mask_rows<Tile::rows>(at, mask_of(at), 0);
    }
  }

  template <int mask_width>
  __device__ static void mask_rows(Element* rows, const Element* mask, int first_chunk) {
    for_each_chunk<Tile, Tile::rows>([&](int sample, int c, int place) {
      Element* g = rows + place;
      const uint4 h = read_chunk(mask + place_of<Tile, mask_width>(sample, c + first_chunk));
      uint4 kept = read_chunk(g);
      kept.x = growkernels::cuda::keep_active<Element>(kept.x, h.x);
      kept.y = growkernels::cuda::keep_active<Element>(kept.y, h.y);
      kept.z = growkernels::cuda::keep_active<Element>(kept.z, h.z);
      kept.w = growkernels::cuda::keep_active<Element>(kept.w, h.w);
      write_chunk(g, kept);
    });
  }

  template <Activation activation>
  __device__ void activate_columns(Element* columns) const {
    for_each_chunk<Tile, Tile::columns>([&](int, int, int place) {
      Element* h = columns + place;
      auto loaded = __builtin_bit_cast(Chunk<Element>, read_chunk(h));
#pragma unroll
      for (int e = 0; e < chunk; ++e) {
        const float scaled = growkernels::cuda::widen(loaded.values[e]) * table.scale;
        loaded.values[e] = growkernels::cuda::narrow<Element>(activate<Element, activation>(scaled));
      }
      write_chunk(h, __builtin_bit_cast(uint4, loaded));
    });
  }

  __device__ void sum(Tile& tile) const {
    const int steps = (count + Tile::depth - 1) / Tile::depth;
    if (steps <= 0) {
      return;
    }
#pragma unroll
    for (int step = 0; step < Tile::stages - 1; ++step) {
      if (step < steps) {
        load_step(step);
      }
      growkernels::cuda::commit_copies();
    }
    growkernels::cuda::wait_for_copies<Tile::stages - 2>();
    __syncthreads();
    transform_step(0);
    // Half of the warps transform first and half multiply first, so that tensor cores never wait for all.
    const bool transforms_first = threadIdx.x / 128 % 2 == 0;
    for (int step = 0; step < steps; ++step) {
      growkernels::cuda::wait_for_copies<Tile::stages - 3>();
      __syncthreads();
      if (step + Tile::stages - 1 < steps) {
        load_step(step + Tile::stages - 1);
      }
      growkernels::cuda::commit_copies();
      if (transforms_first && step + 1 < steps) {
        transform_step(step + 1);
      }
      tile.multiply(stage(step), columns_of(stage(step)));
      if (!transforms_first && step + 1 < steps) {
        transform_step(step + 1);
      }
    }
  }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks) sum_products(const __grid_constant__ Table table) {
  const Position& position = find_position(table, &Position::first_block);
  // Blocks that read the same samples are neighbours: they run at the same time and share the L2 cache.
  const int block = blockIdx.x - position.first_block, tile = block % position.tiles, split = block / position.tiles;
  const int row = tile / position.tiles_across * Tile::rows, column = tile % position.tiles_across * Tile::columns;
  const int64_t range = static_cast<int64_t>(position.steps) * Tile::depth, begin = split * range;
  const Product<Tile> product{table,
                              position,
                              row,
                              column,
                              begin,
                              static_cast<int>(min(range, position.samples - begin)),
                              row >= column && row + Tile::rows <= column + Tile::columns};
  Tile sums;
  product.sum(sums);
  if (position.splits == 1) {
    finish<Tile, Tile::values, Tile::threads>(table, position, tile, 0, tile, [&](int v) { return sums.value(v); });
    return;
  }
  const int64_t slot =
      static_cast<int64_t>(position.first_partial) + static_cast<int64_t>(split) * position.tiles + tile;
  float* partial = table.partials + slot * (Tile::rows * Tile::columns) + threadIdx.x;
#pragma unroll
  for (int e = 0; e < Tile::values; ++e) {
    partial[e * Tile::threads] = sums.value(e);
  }
}

}  // namespace growkernels::virtual_grad::cuda
