#pragma once
// Positions so narrow that a sample's whole outer product fits in a few lanes. Lanes in groups of Width
// take a sample each: lane j holds column j of G and is told g[i] of every row i by the others.

#include "common/cuda_activation.cuh"
#include "virtual_grad/cuda_finish.cuh"
#include "virtual_grad/cuda_table.h"
#include "virtual_grad/cuda_tile.cuh"

namespace growkernels::virtual_grad::cuda {

using growkernels::cuda::activate;
using growkernels::cuda::with_activation;

constexpr int narrow_threads = 512;

template <typename Element, int Width>
__global__ void __launch_bounds__(narrow_threads) sum_narrow_products(const __grid_constant__ Table table) {
  using Tile = NarrowTile<Element, Width>;
  constexpr int groups = narrow_threads / Width, unrolled = 4;
  __shared__ float shared[groups][Width][Width];
  const Position& position = find_position(table, &Position::first_block);
  const int split = blockIdx.x - position.first_block, group = threadIdx.x / Width, lane = threadIdx.x % Width;
  // A step is one sample for every group.
  const int64_t range = static_cast<int64_t>(position.steps) * groups, begin = split * range;
  const int64_t end = min(begin + range, position.samples);
  const Element* h = static_cast<const Element*>(position.h) + lane;
  const Element* g = static_cast<const Element*>(position.g) + lane;

  float sums[Width] = {};
  for (int64_t first = begin; first < end; first += groups * unrolled) {
    float inputs[unrolled], grads[unrolled];
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      const int64_t m = first + u * groups + group;
      const bool inside = m < end && lane < position.width;
      inputs[u] = inside ? growkernels::cuda::widen(h[m * position.h_stride]) : 0.0f;
      grads[u] = inside ? growkernels::cuda::widen(g[m * position.g_stride]) : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      float input = inputs[u], grad = grads[u];
      if (table.layer == Layer::LinearRelu) {
        grad = input <= 0.0f ? 0.0f : grad;
      } else {
        with_activation(table.activation, [&]<Activation activation>() {
          input = growkernels::cuda::widen(
              growkernels::cuda::narrow<Element>(activate<Element, activation>(input * table.scale)));
        });
      }
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        sums[i] += __shfl_sync(0xffffffffu, grad, i, Width) * input;
      }
    }
  }

#pragma unroll
  for (int i = 0; i < Width; ++i) {
    shared[group][i][lane] = sums[i];
  }
  __syncthreads();
  Tile tile{0};
  if (threadIdx.x < Tile::threads) {
    const int i = threadIdx.x / Width, j = threadIdx.x % Width;
    for (int q = 0; q < groups; ++q) {
      tile.sum += shared[q][i][j];
    }
    if (position.splits > 1) {
      const int64_t slot = static_cast<int64_t>(position.first_partial) + split;
      table.partials[slot * Tile::threads + threadIdx.x] = tile.sum;
    }
  }
  if (position.splits == 1) {
    finish<Tile, 1, narrow_threads>(table, position, 0, 0, 0, [&](int) { return tile.sum; });
  }
}

}  // namespace growkernels::virtual_grad::cuda
