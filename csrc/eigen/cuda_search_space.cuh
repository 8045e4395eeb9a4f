#pragma once
// One step of the batched Lanczos solver, a block of threads for each neuron: what
// growkernels/solvers/search_space.py does in `extend` and `add`, in one launch instead of some
// eighty. Both work on the same state and may take turns. Torch-free CUDA; tests compile it for the
// host.
//
// A thread owns the same elements of every vector: linear combinations need no barrier, only scalar
// products do. It has packs of up to 16 bytes, blockDim.x packs apart.

#include "eigen/cuda_rayleigh_ritz.cuh"

#include <float.h>
#include <math.h>

#include <cstdint>

namespace growkernels::eigen {

template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
  T at[width];

  static __device__ __forceinline__ Pack load(const T* from) { return *reinterpret_cast<const Pack*>(from); }
  // By an intrinsic: the compiler splits a plain assignment into words.
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (width == 4) {
      __stwb(reinterpret_cast<float4*>(to), make_float4(at[0], at[1], at[2], at[3]));
    } else if constexpr (width == 2) {
      __stwb(reinterpret_cast<double2*>(to), make_double2(at[0], at[1]));
    } else {
      *to = at[0];
    }
  }

  __device__ __forceinline__ void add(T factor, const Pack& other) {
#pragma unroll
    for (int w = 0; w < width; ++w) {
      at[w] += factor * other.at[w];
    }
  }
  // sum + this . other
  __device__ __forceinline__ T dot(const Pack& other, T sum) const {
#pragma unroll
    for (int w = 0; w < width; ++w) {
      sum += at[w] * other.at[w];
    }
    return sum;
  }
};

// Sums the first `used` of x over the block, in an order that never changes; all threads get them.
template <int most, typename T, int width>
__device__ __forceinline__ void block_sums(T (&x)[most], int used, T (&partial)[kSearchSpaceMostWarps][width]) {
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
template <int width, typename T, int k>
__device__ void take_images(const SearchSpace<T>& space, const T* product, int d, int count,
                            SearchSpaceScratch<T, k>& scratch) {
  using Elements = Pack<T, width>;
  constexpr int columns = kSearchSpaceBlocks * k;
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
#pragma unroll 1
    for (int c = width * threadIdx.x; c < d; c += width * blockDim.x) {
      Elements image = Elements::load(product + i * d + c);
#pragma unroll
      for (int w = 0; w < width; ++w) {
        image.at[w] /= unit;
      }
      image.store(space.images + (count + i) * d + c);
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        if (j < count + k) {
          sums[j] = image.dot(Elements::load(space.basis + j * d + c), sums[j]);
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

// A pack of each row of the basis, or of the images: leaves its combinations in the Ritz vectors,
// and of a full basis the rows that a restart keeps.
template <int width, typename T, int k>
__device__ __forceinline__ void combine(T* rows, int d, int count, bool full, const SearchSpaceScratch<T, k>& scratch,
                                        Pack<T, width> (&ritz)[k]) {
  using Elements = Pack<T, width>;
  constexpr int columns = kSearchSpaceBlocks * k, kept = 2 * k + 1;
  Elements elements[columns];
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    elements[j] = j < count ? Elements::load(rows + j * d) : Elements{};
  }
#pragma unroll
  for (int i = 0; i < k; ++i) {
    ritz[i] = {};
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (j < count) {
        ritz[i].add(scratch.chosen[i][j], elements[j]);
      }
    }
  }
  // Unrolled, all of the transform would sit in registers.
#pragma unroll 1
  for (int row = 0; row < (full ? kept : 0); ++row) {
    Elements sum = {};
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (j < count) {
        sum.add(scratch.transform[row][j], elements[j]);
      }
    }
    sum.store(rows + row * d);
  }
}

// The residuals of the Ritz pairs become the columns from `next` on; a full basis and its images are
// cut down on the way.
template <int width, typename T, int k>
__device__ void write_residuals(const SearchSpace<T>& space, int d, int count, bool full, int next,
                                const SearchSpaceScratch<T, k>& scratch) {
#pragma unroll 1
  for (int c = width * threadIdx.x; c < d; c += width * blockDim.x) {
    Pack<T, width> vectors[k], images[k];
    combine(space.basis + c, d, count, full, scratch, vectors);
    combine(space.images + c, d, count, full, scratch, images);
#pragma unroll
    for (int i = 0; i < k; ++i) {
      images[i].add(-scratch.value[i], vectors[i]);
      images[i].store(space.basis + (next + i) * d + c);
    }
  }
}

// Takes from row `row` of the basis its components along rows `first` to `last` - 1, at once.
// Returns this thread's part of the square of what is left.
template <int width, typename T, int k>
__device__ __forceinline__ T project_out(const SearchSpace<T>& space, int d, int first, int last, int row,
                                         SearchSpaceScratch<T, k>& scratch) {
  using Elements = Pack<T, width>;
  constexpr int columns = kSearchSpaceBlocks * k;
  T shares[columns] = {};
#pragma unroll 1
  for (int c = width * threadIdx.x; c < d; c += width * blockDim.x) {
    const Elements mine = Elements::load(space.basis + row * d + c);
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (j < last - first) {
        shares[j] = mine.dot(Elements::load(space.basis + (first + j) * d + c), shares[j]);
      }
    }
  }
  block_sums(shares, last - first, scratch.partial);
  T square = 0;
#pragma unroll 1
  for (int c = width * threadIdx.x; c < d; c += width * blockDim.x) {
    Elements mine = Elements::load(space.basis + row * d + c);
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (j < last - first) {
        mine.add(-shares[j], Elements::load(space.basis + (first + j) * d + c));
      }
    }
    mine.store(space.basis + row * d + c);
    square = mine.dot(mine, square);
  }
  return square;
}

// Makes the k rows from `next` on orthonormal, to each other and to those before; rows that are
// rounding beside |S| become zero and count as dead.
template <int width, typename T, int k>
__device__ void orthonormalise(const SearchSpace<T>& space, int d, int next, SearchSpaceScratch<T, k>& scratch) {
  const T epsilon = sizeof(T) == sizeof(float) ? T(FLT_EPSILON) : T(DBL_EPSILON);
  T noise = 16 * epsilon * scratch.norm;
  bool dead[k] = {};
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (int i = 0; i < k; ++i) {
      const int row = next + i;
      T square[1] = {project_out<width>(space, d, 0, next, row, scratch)};
      for (int again = 0; again < (i == 0 ? 0 : 2); ++again) {
        square[0] = project_out<width>(space, d, next, row, row, scratch);
      }
      block_sums(square, 1, scratch.partial);
      const T length = sqrt(square[0]);
      const bool rounding = !(length > noise);
      const T factor = rounding ? T(0) : 1 / length;
#pragma unroll 1
      for (int c = width * threadIdx.x; c < d; c += width * blockDim.x) {
        auto mine = Pack<T, width>::load(space.basis + row * d + c);
#pragma unroll
        for (int w = 0; w < width; ++w) {
          mine.at[w] *= factor;
        }
        mine.store(space.basis + row * d + c);
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
// basis. The state's arrays hold one neuron after another; a block for each. `width` divides d.
template <typename T, int k, int width>
__global__ void __launch_bounds__(32 * kSearchSpaceMostWarps, k == 1 && sizeof(T) == 4 ? 3 : 1)
    search_space_kernel(SearchSpace<T> all, const T* __restrict__ product, int d, int count) {
  constexpr int columns = kSearchSpaceBlocks * k;
  __shared__ SearchSpaceScratch<T, k> scratch;
  const int64_t neuron = blockIdx.x, vectors = neuron * columns * d;
  const SearchSpace<T> space = {all.basis + vectors,
                                all.images + vectors,
                                all.projected + neuron * columns * columns,
                                all.previous + neuron * k * columns,
                                all.dead + neuron * columns,
                                all.norm + neuron,
                                all.unit + neuron};
  take_images<width>(space, product + neuron * k * d, d, count, scratch);
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
  write_residuals<width>(space, d, count + k, full, next, scratch);
  orthonormalise<width>(space, d, next, scratch);
}

// Elements of a pack for vectors of d elements that begin at multiples of 16 bytes.
template <typename T>
constexpr int search_space_width(int64_t d) {
  constexpr int most = 16 / sizeof(T);
  return d % most == 0 ? most : 1;
}

// Threads of a block: with few, all neurons of a layer run at a time; long vectors want more.
constexpr int search_space_threads(int64_t d) { return d <= 512 ? 64 : d <= 1024 ? 128 : 32 * kSearchSpaceMostWarps; }

}  // namespace growkernels::eigen
