#pragma once
// Small matrices of the batched Lanczos solver, a warp for each neuron: Ritz pairs of the present
// basis, and what a restart keeps of it. The algorithm is that of growkernels/solvers/search_space.py.
// Torch-free CUDA; tests compile it for the host.

#include "common/warp.cuh"
#include "eigen/constants.h"
#include "eigen/cuda_jacobi.cuh"

#include <float.h>
#include <math.h>

#include <cstdint>

namespace growkernels::eigen {

using cuda::warp_max;
using cuda::warp_sum;

inline constexpr int kSearchSpaceMostWarps = 8;

template <typename T, int k>
struct SearchSpaceScratch {
  static constexpr int columns = kSearchSpaceBlocks * k, kept = 2 * k + 1;

  alignas(16) unsigned char eigen[jacobi_workspace_bytes(columns)];
  T partial[kSearchSpaceMostWarps][columns];
  T products[k][columns];      // of the new images with the basis
  T chosen[k][columns];        // coordinates of the Ritz vectors
  T transform[kept][columns];  // from the full basis to the one a restart leaves
  T value[k];
  T norm;
};

// Gram and Schmidt in the last k rows, one column a lane; rows no longer than `noise` become zero.
template <int k>
__device__ __forceinline__ void orthonormal_columns(double (&rows)[k], double noise, bool (&dead)[k]) {
#pragma unroll
  for (int i = 0; i < k; ++i) {
    for (int pass = 0; pass < (i == 0 ? 0 : 2); ++pass) {
      double shares[k];
#pragma unroll
      for (int b = 0; b < i; ++b) {
        shares[b] = warp_sum(rows[i] * rows[b]);
      }
#pragma unroll
      for (int b = 0; b < i; ++b) {
        rows[i] -= shares[b] * rows[b];
      }
    }
    const double length = sqrt(warp_sum(rows[i] * rows[i]));
    dead[i] = !(length > noise);
    // NaN stays NaN.
    rows[i] *= dead[i] ? 0.0 : 1 / length;
  }
}

// Ritz pairs of one neuron, as one warp has them: lane i holds the i-th smallest value.
struct RitzPairs {
  JacobiWorkspace work;
  double unit;   // of the values in `work`; NaN where the projection is not finite
  double value;  // zero beyond the last
  int live;      // values from here on belong to dead columns

  // Coordinate `column` of vector i in the basis.
  __device__ double coordinate(int i, int column) const { return unit == unit ? work.vector(i)[column] : unit; }
};

// Projects S on the basis of `count` columns, and finds and stores the Ritz pairs.
template <typename T, int k>
__device__ RitzPairs rayleigh_ritz(const SearchSpace<T>& space, int count, SearchSpaceScratch<T, k>& scratch) {
  constexpr int columns = kSearchSpaceBlocks * k;
  static_assert(columns <= 32);
  const int lane = threadIdx.x % 32, old = count - k;
  for (int e = lane; e < k * count; e += 32) {
    const int i = e / count, j = e % count;
    const double one = scratch.products[i][j];
    const double value = j < old ? one : 0.5 * (one + static_cast<double>(scratch.products[j - old][old + i]));
    space.projected[(old + i) * columns + j] = value;
  }
  __syncwarp();
  double largest = 0;
  for (int e = lane; e < count * count; e += 32) {
    const int i = e / count, j = e % count;
    const double size = j <= i ? fabs(space.projected[i * columns + j]) : 0.0;
    largest = size > largest ? size : largest;
  }
  // Above every eigenvalue of the live part (Gershgorin), so that dead columns come last.
  const double bound = count * warp_max(largest);
  const bool dead = lane < count && space.dead[lane];
  RitzPairs found = {JacobiWorkspace(scratch.eigen, count), 0, 0, count - __popc(__ballot_sync(0xFFFFFFFF, dead))};
  found.unit = jacobi_eigenpairs<OneWarp>(found.work, [&](int i, int j) {
    return space.projected[i * columns + j] + (i == j && space.dead[i] ? 2 * bound + DBL_MIN : 0.0);
  });
  const bool finite = found.unit == found.unit;
  found.value = lane >= count ? 0.0 : finite ? found.work.value(lane) * found.unit : found.unit;
  const double norm = warp_max(found.value > bound ? 0.0 : fabs(found.value));
  if (lane == 0) {
    const T before = *space.norm, now = static_cast<T>(finite ? norm : found.unit);
    scratch.norm = *space.norm = now <= before ? before : now;
  }
  if (lane < k) {
    scratch.value[lane] = static_cast<T>(found.value);
  }
  for (int i = 0; i < k && lane < count; ++i) {
    scratch.chosen[i][lane] = static_cast<T>(found.coordinate(i, lane));
  }
  return found;
}

// Cuts a full basis down to the k + 1 smallest Ritz vectors and what the last ones add to them:
// stores the transform that does it and what the smaller basis begins with.
template <typename T, int k>
__device__ void restart(const SearchSpace<T>& space, int count, const RitzPairs& found,
                        SearchSpaceScratch<T, k>& scratch) {
  constexpr int columns = kSearchSpaceBlocks * k, kept = 2 * k + 1;
  const int lane = threadIdx.x % 32;
  const double value = lane < found.live ? found.value : 0.0;
  // In the basis of the Ritz vectors, where the projection of S is diagonal.
  double added[k];
  bool nothing[k];
#pragma unroll
  for (int i = 0; i < k; ++i) {
    added[i] = 0;
    for (int c = 0; c < count && lane > k && lane < found.live; ++c) {
      added[i] += space.previous[i * columns + c] * found.coordinate(lane, c);
    }
  }
  orthonormal_columns(added, 1e-6, nothing);
  // A dead vector is a dead column, of zeros.
  for (int row = 0; row <= k && lane < count; ++row) {
    scratch.transform[row][lane] = static_cast<T>(found.coordinate(row, lane));
  }
#pragma unroll
  for (int i = 0; i < k; ++i) {
    double sum = 0;
    for (int j = 0; j < count; ++j) {
      sum += __shfl_sync(0xFFFFFFFF, added[i], j) * (lane < count ? found.coordinate(j, lane) : 0.0);
    }
    if (lane < count) {
      scratch.transform[k + 1 + i][lane] = static_cast<T>(sum);
    }
  }
  for (int e = lane; e < columns * columns; e += 32) {
    space.projected[e] = 0;
  }
  __syncwarp();
  if (lane <= k) {
    space.projected[lane * (columns + 1)] = value;
    space.dead[lane] = lane >= found.live;
  }
#pragma unroll
  for (int i = 0; i < k; ++i) {
#pragma unroll
    for (int j = 0; j < k; ++j) {
      const double inner = warp_sum(added[i] * value * added[j]);
      if (lane == 0) {
        space.projected[(k + 1 + i) * columns + k + 1 + j] = inner;
      }
    }
    if (lane == 0) {
      space.dead[k + 1 + i] = nothing[i];
    }
  }
  // The last Ritz vectors are the first columns.
  for (int e = lane; e < k * columns; e += 32) {
    space.previous[e] = e / columns == e % columns ? 1.0 : 0.0;
  }
  static_assert(kept + k <= columns);
}

}  // namespace growkernels::eigen
