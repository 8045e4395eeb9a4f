#pragma once
// One step of the batched Lanczos solver, a block of threads for each neuron: what
// growkernels/solvers/search_space.py does in `extend` and `add`, in one launch instead of some
// eighty. Both work on the same state and may take turns. Torch-free CUDA; tests compile it for the
// host.
//
// A thread owns the elements threadIdx.x, threadIdx.x + blockDim.x, ... of every vector: linear
// combinations need no barrier, only scalar products do.

#include "splitting/cuda_rayleigh_ritz.cuh"

#include <float.h>
#include <math.h>

#include <cstdint>

namespace growkernels::splitting {

// Sums the first `used` of x over the block, in an order that never changes; all threads get them.
template <int most, typename T, int width>
__device__ __forceinline__ void block_sums(T (&x)[most], int used, T (&partial)[kSearchMostWarps][width]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
  for (int j = 0; j < most; ++j) {
    if (j < used) {
      const T sum = warp_sum(x[j]);
      if (lane == 0) {
        partial[warp][j] = sum;
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < most; ++j) {
    if (j < used) {
      x[j] = partial[0][j];
      for (int other = 1; other < warps; ++other) {
        x[j] += partial[other][j];
      }
    }
  }
  __syncthreads();
}

// Writes the images of the newest directions, in units of the neuron's, and their products with the
// basis.
template <typename T, int k>
__device__ void take_images(const SearchSpace<T>& space, const T* product, int d, int count,
                            SearchScratch<T, k>& scratch) {
  constexpr int columns = kSearchBlocks * k;
  T unit = 0;
  if (count == 0) {
    for (int c = threadIdx.x; c < k * d; c += blockDim.x) {
      const T size = fabs(product[c]);
      unit = size > unit ? size : unit;
    }
    unit = warp_max(unit);
    if (threadIdx.x % 32 == 0) {
      scratch.partial[threadIdx.x / 32][0] = unit;
    }
    __syncthreads();
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) {
      const T other = scratch.partial[warp][0];
      unit = other > unit ? other : unit;
    }
    __syncthreads();
    unit = unit == 0 ? 1 : unit;
    if (threadIdx.x == 0) {
      *space.unit = unit;
    }
  } else {
    unit = *space.unit;
  }
  for (int i = 0; i < k; ++i) {
    T sums[columns] = {};
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
      const T image = product[i * d + c] / unit;
      space.images[(count + i) * d + c] = image;
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        if (j < count + k) {
          sums[j] += image * space.basis[j * d + c];
        }
      }
    }
    block_sums(sums, count + k, scratch.partial);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        scratch.products[i][j] = sums[j];
      }
    }
  }
  __syncthreads();
}

// One element of each row of the basis, or of the images: leaves its combinations in the Ritz
// vectors, and of a full basis the rows that a restart keeps.
template <typename T, int k>
__device__ __forceinline__ void combine(T* rows, int d, int count, bool full, const SearchScratch<T, k>& scratch,
                                        T (&ritz)[k]) {
  constexpr int columns = kSearchBlocks * k, kept = 2 * k + 1;
  T elements[columns];
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    elements[j] = j < count ? rows[j * d] : T(0);
  }
#pragma unroll
  for (int i = 0; i < k; ++i) {
    ritz[i] = 0;
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (j < count) {
        ritz[i] += scratch.chosen[i][j] * elements[j];
      }
    }
  }
#pragma unroll
  for (int row = 0; row < (full ? kept : 0); ++row) {
    T sum = 0;
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (j < count) {
        sum += scratch.transform[row][j] * elements[j];
      }
    }
    rows[row * d] = sum;
  }
}

// The residuals of the Ritz pairs become the columns from `next` on; a full basis and its images are
// cut down on the way.
template <typename T, int k>
__device__ void write_residuals(const SearchSpace<T>& space, int d, int count, bool full, int next,
                                const SearchScratch<T, k>& scratch) {
#pragma unroll 1
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    T vectors[k], images[k];
    combine(space.basis + c, d, count, full, scratch, vectors);
    combine(space.images + c, d, count, full, scratch, images);
#pragma unroll
    for (int i = 0; i < k; ++i) {
      space.basis[(next + i) * d + c] = images[i] - scratch.value[i] * vectors[i];
    }
  }
}

// Takes from row `row` of the basis its components along rows `first` to `last` - 1, at once.
template <typename T, int k>
__device__ __forceinline__ void project_out(const SearchSpace<T>& space, int d, int first, int last, int row,
                                            SearchScratch<T, k>& scratch) {
  constexpr int columns = kSearchBlocks * k;
  T shares[columns] = {};
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    const T element = space.basis[row * d + c];
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (j < last - first) {
        shares[j] += element * space.basis[(first + j) * d + c];
      }
    }
  }
  block_sums(shares, last - first, scratch.partial);
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    T taken = 0;
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (j < last - first) {
        taken += shares[j] * space.basis[(first + j) * d + c];
      }
    }
    space.basis[row * d + c] -= taken;
  }
}

// Makes the k rows from `next` on orthonormal, to each other and to those before; rows that are
// rounding beside |S| become zero and count as dead.
template <typename T, int k>
__device__ void orthonormalise(const SearchSpace<T>& space, int d, int next, SearchScratch<T, k>& scratch) {
  const T epsilon = sizeof(T) == sizeof(float) ? T(FLT_EPSILON) : T(DBL_EPSILON);
  T noise = 16 * epsilon * scratch.norm;
  bool dead[k] = {};
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = 0; i < k; ++i) {
      project_out(space, d, 0, next, next + i, scratch);
    }
#pragma unroll
    for (int i = 0; i < k; ++i) {
      const int row = next + i;
      for (int again = 0; again < (i == 0 ? 0 : 2); ++again) {
        project_out(space, d, next, row, row, scratch);
      }
      T square[1] = {};
      for (int c = threadIdx.x; c < d; c += blockDim.x) {
        square[0] += space.basis[row * d + c] * space.basis[row * d + c];
      }
      block_sums(square, 1, scratch.partial);
      const T length = sqrt(square[0]);
      const bool rounding = !(length > noise);
      const T factor = rounding ? T(0) : 1 / length;
      for (int c = threadIdx.x; c < d; c += blockDim.x) {
        space.basis[row * d + c] *= factor;
      }
      dead[i] |= rounding;
    }
    // From now on the rows have unit length.
    noise = T(0.1);
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < k; ++i) {
      space.dead[next + i] = dead[i];
    }
  }
}

// Takes S applied to the directions in columns `count` to count + k of each neuron's basis, [n, k, d],
// and makes the next k: in the columns after those, or after the 2 k + 1 that are left of a full
// basis. The state's arrays hold one neuron after another; a block for each.
template <typename T, int k>
__global__ void __launch_bounds__(32 * kSearchMostWarps, k == 1 && sizeof(T) == 4 ? 3 : 1)
    search_space_kernel(SearchSpace<T> all, const T* __restrict__ product, int d, int count) {
  constexpr int columns = kSearchBlocks * k;
  __shared__ SearchScratch<T, k> scratch;
  const int64_t neuron = blockIdx.x, vectors = neuron * columns * d;
  const SearchSpace<T> space = {all.basis + vectors,
                                all.images + vectors,
                                all.projected + neuron * columns * columns,
                                all.previous + neuron * k * columns,
                                all.dead + neuron * columns,
                                all.norm + neuron,
                                all.unit + neuron};
  take_images(space, product + neuron * k * d, d, count, scratch);
  const bool full = count + 2 * k > columns;
  const int next = full ? 2 * k + 1 : count + k;
  if (threadIdx.x < 32) {
    const RitzPairs found = rayleigh_ritz(space, count + k, scratch);
    if (full) {
      restart(space, count + k, found, scratch);
    } else {
      for (int e = threadIdx.x; e < k * columns; e += 32) {
        const int column = e % columns;
        space.previous[e] = column < count + k ? found.coordinate(e / columns, column) : 0.0;
      }
    }
    // The next directions' rows.
    for (int e = threadIdx.x; e < k * columns; e += 32) {
      space.projected[next * columns + e] = 0;
    }
  }
  __syncthreads();
  write_residuals(space, d, count + k, full, next, scratch);
  orthonormalise(space, d, next, scratch);
}

// Threads of a block: with few, all neurons of a layer run at a time; long vectors want more.
inline int search_space_threads(int d) { return d <= 1024 ? 64 : 32 * kSearchMostWarps; }

}  // namespace growkernels::splitting
