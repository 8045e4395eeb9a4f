#pragma once
// A tile of G in the registers of a block, and the product of one step: [rows, depth] [depth, columns],
// both operands in shared memory with samples as rows. Every kind of tile has the same members, so that
// one kernel serves all of them.
//
// Shared memory holds rows of 16-byte chunks. Chunk c of sample m lies at place c ^ swizzle(m), which
// spreads what the lanes of a warp read at the same time over all banks.

#include "common/cuda_instructions.cuh"

namespace growkernels::virtual_grad::cuda {

using growkernels::cuda::BFloat16;
using growkernels::cuda::Half;

// A tile on tensor cores: a warp owns [WarpRows, WarpColumns] of it, in fragments of [16, 8].
template <int Rows, int Columns, int WarpRows, int WarpColumns>
struct FragmentTile {
  static constexpr int rows = Rows, columns = Columns, stages = 4;
  static constexpr int warps_across = Columns / WarpColumns;
  static constexpr int threads = 32 * (Rows / WarpRows) * warps_across;
  static constexpr int values = WarpRows * WarpColumns / 32;
  static constexpr int values_per_sum_block = 4;
  static_assert(Rows % 64 == 0 && Columns % 64 == 0 && WarpRows % 16 == 0 && WarpColumns % 16 == 0);

  float sums[WarpRows / 16][WarpColumns / 8][4] = {};

  // The warp's corner in the tile.
  __device__ static int warp_row() { return threadIdx.x / 32 / warps_across * WarpRows; }
  __device__ static int warp_column() { return threadIdx.x / 32 % warps_across * WarpColumns; }

  __device__ float value(int e) const { return sums[e / 4 / (WarpColumns / 8)][e / 4 % (WarpColumns / 8)][e % 4]; }

  // Of value e of this thread.
  __device__ static int row_of(int e) {
    return warp_row() + e / 4 / (WarpColumns / 8) * 16 + threadIdx.x % 32 / 4 + e % 4 / 2 * 8;
  }
  __device__ static int column_of(int e) {
    return warp_column() + e / 4 % (WarpColumns / 8) * 8 + threadIdx.x % 4 * 2 + e % 2;
  }
};

// 16-bit elements.
template <typename Element_, int Rows, int Columns, int WarpRows, int WarpColumns, int Blocks>
struct HalfTile : FragmentTile<Rows, Columns, WarpRows, WarpColumns> {
  using Element = Element_;
  static constexpr int depth = 32;
  static constexpr int blocks = Blocks;     // resident on a multiprocessor at a time
  static constexpr int swizzle_period = 8;  // samples

  __device__ static int swizzle(int sample) { return sample & 7; }

  __device__ void multiply(const Element* a, const Element* b) {
    const int lane = threadIdx.x % 32;
    const int row_chunk = this->warp_row() / 8 + (lane >> 3 & 1);
    const int column_chunk = this->warp_column() / 8 + (lane >> 4);
    const Element* a_row = a + ((lane & 7) + (lane >> 4) * 8) * Rows;
    const Element* b_row = b + ((lane & 7) + (lane >> 3 & 1) * 8) * Columns;
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      uint32_t fa[WarpRows / 16][4];
#pragma unroll
      for (int i = 0; i < WarpRows / 16; ++i) {
        load_matrices_transposed(fa[i], a_row + k * Rows + ((row_chunk + 2 * i) ^ (lane & 7)) * 8);
      }
#pragma unroll
      for (int j = 0; j < WarpColumns / 16; ++j) {
        uint32_t fb[4];
        load_matrices_transposed(fb, b_row + k * Columns + ((column_chunk + 2 * j) ^ (lane & 7)) * 8);
#pragma unroll
        for (int i = 0; i < WarpRows / 16; ++i) {
          growkernels::cuda::multiply_accumulate<Element>(this->sums[i][2 * j], fa[i], fb[0], fb[1]);
          growkernels::cuda::multiply_accumulate<Element>(this->sums[i][2 * j + 1], fa[i], fb[2], fb[3]);
        }
      }
    }
  }
};

// float32 rounded to TensorFloat-32.
template <int Rows, int Columns, int WarpRows, int WarpColumns, int Blocks>
struct Tf32Tile : FragmentTile<Rows, Columns, WarpRows, WarpColumns> {
  using Element = float;
  static constexpr int depth = 16, blocks = Blocks, swizzle_period = 4;

  __device__ static int swizzle(int sample) { return (sample & 3) << 1; }

  __device__ void multiply(const float* a, const float* b) {
    const int lane = threadIdx.x % 32, sample = lane % 4, flip = swizzle(sample) * 4;
    const int row = this->warp_row() + lane / 4, column = this->warp_column() + lane / 4;
    const auto element = [&](const float* operand, int pitch, int k, int at) {
      return growkernels::cuda::round_to_tf32(operand[(k + sample) * pitch + (at ^ flip)]);
    };
#pragma unroll
    for (int k = 0; k < depth; k += 8) {
      uint32_t fa[WarpRows / 16][4];
#pragma unroll
      for (int i = 0; i < WarpRows / 16; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          fa[i][q] = element(a, Rows, k + q / 2 * 4, row + 16 * i + q % 2 * 8);
        }
      }
#pragma unroll
      for (int j = 0; j < WarpColumns / 8; ++j) {
        const uint32_t b0 = element(b, Columns, k, column + 8 * j), b1 = element(b, Columns, k + 4, column + 8 * j);
#pragma unroll
        for (int i = 0; i < WarpRows / 16; ++i) {
          growkernels::cuda::multiply_accumulate_tf32(this->sums[i][j], fa[i], b0, b1);
        }
      }
    }
  }
};

// float32 without tensor cores: 16 x 16 threads, each with [Rows / 16, Columns / 16] of the tile in blocks
// of 4 x 4 that lie 64 apart.
template <int Rows, int Columns, int Blocks>
struct FloatTile {
  using Element = float;
  static constexpr int rows = Rows, columns = Columns, depth = 16, stages = 4;
  static constexpr int threads = 256;
  static constexpr int blocks = Blocks;
  static constexpr int values = Rows * Columns / threads;
  static constexpr int values_per_sum_block = 4;
  static_assert(Rows % 64 == 0 && Columns % 64 == 0);

  float sums[Rows / 16][Columns / 16] = {};

  static constexpr int swizzle_period = 1;
  __device__ static int swizzle(int) { return 0; }

  __device__ void multiply(const float* a, const float* b) {
    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
    for (int k = 0; k < depth; ++k) {
      float4 fa[Rows / 64], fb[Columns / 64];
#pragma unroll
      for (int i = 0; i < Rows / 64; ++i) {
        fa[i] = *reinterpret_cast<const float4*>(a + k * Rows + row + 64 * i);
      }
#pragma unroll
      for (int j = 0; j < Columns / 64; ++j) {
        fb[j] = *reinterpret_cast<const float4*>(b + k * Columns + column + 64 * j);
      }
#pragma unroll
      for (int i = 0; i < Rows / 16; ++i) {
#pragma unroll
        for (int j = 0; j < Columns / 16; ++j) {
          sums[i][j] += component(fa[i / 4], i % 4) * component(fb[j / 4], j % 4);
        }
      }
    }
  }

  __device__ float value(int e) const { return sums[e / (Columns / 16)][e % (Columns / 16)]; }

  __device__ static int row_of(int e) { return place(threadIdx.x / 16, e / (Columns / 16)); }
  __device__ static int column_of(int e) { return place(threadIdx.x % 16, e % (Columns / 16)); }

 private:
  __device__ static int place(int thread, int value) { return value / 4 * 64 + thread * 4 + value % 4; }
  __device__ static float component(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
};

// The whole of a narrow G, one value for each of the block's first threads: see cuda_narrow.cuh.
template <typename Element_, int Width>
struct NarrowTile {
  using Element = Element_;
  static constexpr int rows = Width, columns = Width, threads = Width * Width;
  static constexpr int values = 1, values_per_sum_block = 1;

  float sum;

  __device__ float value(int) const { return sum; }
  __device__ static int row_of(int) { return threadIdx.x / Width; }
  __device__ static int column_of(int) { return threadIdx.x % Width; }
};

}  // namespace growkernels::virtual_grad::cuda
