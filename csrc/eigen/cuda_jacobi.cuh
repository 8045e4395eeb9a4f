#pragma once
// All eigenpairs of small symmetric matrices, a group of threads for each: Jacobi rotations in
// parallel order (Golub and Van Loan, Matrix Computations, section 8.5). In every step the indices
// form disjoint pairs, by the round-robin schedule of a tournament; all pairs are rotated at once.
// Torch-free CUDA; tests compile it for the host.

#include "common/dynamic_shared.cuh"
#include "eigen/constants.h"
#include "eigen/cuda_plan.h"

#include <math.h>

#include <cstdint>
#include <type_traits>

namespace growkernels::eigen {

// The threads that work on one matrix.
struct OneWarp {
  static __device__ int rank() { return threadIdx.x % 32; }
  static __device__ int size() { return 32; }
  static __device__ void sync() { __syncwarp(); }
  // Whether it holds for any thread; a barrier as well. A vote alone orders no memory.
  static __device__ bool any(bool mine) {
    const bool found = __any_sync(0xFFFFFFFF, mine) != 0;
    __syncwarp();
    return found;
  }
};

struct WholeBlock {
  static __device__ int rank() { return threadIdx.x; }
  static __device__ int size() { return blockDim.x; }
  static __device__ void sync() { __syncthreads(); }
  static __device__ bool any(bool mine) { return __syncthreads_or(mine) != 0; }
};

// What one matrix needs beside the group's registers.
struct JacobiWorkspace {
  // size rows: the matrix, padded by zeros to an even size, and to its right the rows that become
  // eigenvectors. The stride is odd: a column lies in different banks of shared memory.
  double* rows;
  Rotation* rotations;       // size / 2
  unsigned long long* bits;  // of the largest magnitude
  int* order;                // m: which row has the i-th smallest eigenvalue

  int m, size, stride;

  static __device__ int padded(int m) { return m + m % 2; }

  __device__ JacobiWorkspace(void* memory, int m)
      : rows(static_cast<double*>(memory)),
        rotations(reinterpret_cast<Rotation*>(rows + padded(m) * (2 * padded(m) + 1))),
        bits(reinterpret_cast<unsigned long long*>(rotations + padded(m) / 2)),
        order(reinterpret_cast<int*>(bits + 1)),
        m(m),
        size(padded(m)),
        stride(2 * padded(m) + 1) {}

  __device__ double* row(int i) const { return rows + i * stride; }
  // Of the i-th smallest eigenvalue, once they are found.
  __device__ double value(int i) const { return row(order[i])[order[i]]; }
  __device__ const double* vector(int i) const { return row(order[i]) + size; }
};

// 2^exponent, of a biased exponent in 1 to 2046.
__device__ __forceinline__ double power_of_two(int biased) {
  return __longlong_as_double(static_cast<long long>(biased) << 52);
}

__device__ __forceinline__ Rotation rotation_of(double first, double second, double coupling, double negligible) {
  if (!(fabs(coupling) > negligible)) {
    return {1.0, 0.0, 0.0};
  }
  // By half angles, with two reciprocal roots: a division or a root in double precision takes as
  // long as all the rest. Scaled elements are of order one, so no square overflows or vanishes.
  const double difference = second - first, twice = coupling + coupling;
  const double inverse = rsqrt(difference * difference + twice * twice);
  const double square = 0.5 + 0.5 * (fabs(difference) * inverse);
  const double secant = rsqrt(square);
  const double half_sine = 0.5 * twice * (difference < 0 ? -inverse : inverse);
  return {square * secant, half_sine * secant, half_sine * (secant * secant)};
}

__device__ __forceinline__ void rotate(const Rotation& by, double& x, double& y) {
  const double old = x;
  x = by.cosine * old - by.sine * y;
  y = by.sine * old + by.cosine * y;
}

// Pair i of a step: the round-robin schedule, with the last index staying where it is.
__device__ __forceinline__ void pair_of(int step, int i, int size, int& p, int& q) {
  const int circle = size - 1;
  p = step + i;
  p -= p >= circle ? circle : 0;
  q = step - i;
  q += q < 0 ? circle : 0;
  q = i == 0 ? circle : q;
}

// Rotates row pair i and column pair j, j >= i; pairs from size / 2 on are the eigenvectors'
// columns, which stay as they are.
__device__ __forceinline__ void rotate_block(const JacobiWorkspace& work, int step, int i, int j) {
  const int pairs = work.size / 2;
  int p, q, left, right;
  pair_of(step, i, work.size, p, q);
  const Rotation rows = work.rotations[i];
  if (i == j) {
    double *first = work.row(p) + p, *second = work.row(q) + q, *coupling = work.row(p) + q;
    if (rows.sine != 0) {
      *first -= rows.tangent * *coupling;
      *second += rows.tangent * *coupling;
      *coupling = *(work.row(q) + p) = 0;
    }
    return;
  }
  if (j < pairs) {
    pair_of(step, j, work.size, left, right);
  } else {
    left = 2 * j;
    right = left + 1;
  }
  double a = work.row(p)[left], b = work.row(p)[right], c = work.row(q)[left], d = work.row(q)[right];
  rotate(rows, a, c);
  rotate(rows, b, d);
  if (j < pairs) {
    const Rotation columns = work.rotations[j];
    rotate(columns, a, b);
    rotate(columns, c, d);
    work.row(left)[p] = a;
    work.row(right)[p] = b;
    work.row(left)[q] = c;
    work.row(right)[q] = d;
  }
  work.row(p)[left] = a;
  work.row(p)[right] = b;
  work.row(q)[left] = c;
  work.row(q)[right] = d;
}

// Takes element(i, j), i >= j, of the matrix. Leaves the eigenvalues times 1 / (what is returned)
// on the diagonal of work.rows and the unit eigenvectors to its right, and in work.order which row
// has the i-th smallest. Returns NaN, and leaves nothing, where the matrix is not finite. All
// threads of the group call it together, and all see the results.
template <typename Group, typename Element>
__device__ double jacobi_eigenpairs(const JacobiWorkspace& work, Element&& element) {
  const int m = work.m, size = work.size, pairs = size / 2, rank = Group::rank(), threads = Group::size();
  if (rank == 0) {
    *work.bits = 0;
  }
  Group::sync();
  // Magnitudes are ordered as their bits are, with infinity and NaN above the rest.
  unsigned long long largest = 0;
  for (int e = rank; e < size * 2 * size; e += threads) {
    const int i = e / (2 * size), j = e % (2 * size);
    double value = j == i + size ? 1.0 : 0.0;
    if (i < m && j < m) {
      value = static_cast<double>(i < j ? element(j, i) : element(i, j));
      const auto magnitude = static_cast<unsigned long long>(__double_as_longlong(fabs(value)));
      largest = magnitude > largest ? magnitude : largest;
    }
    work.row(i)[j] = value;
  }
  atomicMax(work.bits, largest);
  Group::sync();
  const unsigned long long bits = *work.bits;
  const int exponent = static_cast<int>(bits >> 52);
  if (exponent == 2047) {
    return NAN;
  }
  // To order one, exactly.
  const int inverse = exponent == 0 ? 2045 : exponent == 2046 ? 1 : 2046 - exponent;
  for (int e = rank; e < size * size; e += threads) {
    work.row(e / size)[e % size] *= power_of_two(inverse);
  }
  const double negligible =
      kJacobiTolerance * power_of_two(inverse) * __longlong_as_double(static_cast<long long>(bits));
  Group::sync();
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < kJacobiSweeps; ++sweep) {
    rotated = false;
    for (int step = 0; step < size - 1; ++step) {
      bool live = false;
      for (int i = rank; i < pairs; i += threads) {
        int p, q;
        pair_of(step, i, size, p, q);
        work.rotations[i] = rotation_of(work.row(p)[p], work.row(q)[q], work.row(p)[q], negligible);
        live |= work.rotations[i].sine != 0;
      }
      if (!Group::any(live)) {
        continue;
      }
      rotated = true;
      for (int i = rank / size, j = rank % size; i < pairs;) {
        if (j >= i) {
          rotate_block(work, step, i, j);
        }
        i += threads / size;
        j += threads % size;
        if (j >= size) {
          j -= size;
          ++i;
        }
      }
      Group::sync();
    }
  }
  for (int i = rank; i < m; i += threads) {
    const double mine = work.row(i)[i];
    int place = 0;
    for (int j = 0; j < m; ++j) {
      const double other = work.row(j)[j];
      place += other < mine || (other == mine && j < i);
    }
    work.order[place] = i;
  }
  Group::sync();
  return power_of_two(2046 - inverse);
}

// a, vectors [n, m, m]; values [n, m]; the lower triangle of a is read. One matrix a block, and
// the next one after it where the grid is smaller. `global` holds a workspace for each block, or is
// null: then it lies in dynamic shared memory.
template <typename T, typename Group, bool in_shared>
__global__ void symmetric_eigs_kernel(const T* __restrict__ a, T* __restrict__ values, T* __restrict__ vectors,
                                      int64_t n, int m, unsigned char* __restrict__ global) {
  void* memory =
      in_shared ? growkernels::dynamic_shared<unsigned char>() : global + jacobi_workspace_bytes(m) * blockIdx.x;
  const JacobiWorkspace work(memory, m);
  const int rank = Group::rank(), threads = Group::size();
  for (int64_t matrix = blockIdx.x; matrix < n; matrix += gridDim.x) {
    const int64_t first = matrix * m * m;
    const double unit = jacobi_eigenpairs<Group>(work, [&](int i, int j) { return a[first + i * m + j]; });
    const bool finite = unit == unit;
    for (int i = rank; i < m; i += threads) {
      values[matrix * m + i] = static_cast<T>(finite ? work.value(i) * unit : unit);
    }
    for (int e = rank; e < m * m; e += threads) {
      vectors[first + e] = static_cast<T>(finite ? work.vector(e / m)[e % m] : unit);
    }
    // The next matrix overwrites what is read here.
    Group::sync();
  }
}

}  // namespace growkernels::eigen
