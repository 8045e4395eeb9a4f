#pragma once
// What kernels and those who launch them agree on, without torch and without CUDA's dialect.

#include <cstddef>
#include <cstdint>

namespace growkernels::eigen {

// x is exchanged for cosine x - sine y, y for sine x + cosine y, so that x and y of a symmetric
// matrix no longer couple. Then x's diagonal element falls by tangent times the coupling, and y's
// rises by that.
struct Rotation {
  double cosine, sine, tangent;
};

// Of the workspace for one matrix [m, m]: JacobiWorkspace in cuda_jacobi.cuh.
constexpr size_t jacobi_workspace_bytes(int m) {
  const size_t size = m + m % 2, doubles = size * (2 * size + 1) + size / 2 * (sizeof(Rotation) / sizeof(double)) + 1;
  return sizeof(double) * (doubles + (size + 1) / 2);
}

// How symmetric_eigs_kernel is launched for matrices of one size, where a block may have `most_shared` bytes of
// shared memory: 99 KiB are enough up to m = 78, the 227 KiB of an H100 up to m = 118.
struct SymmetricEigsLaunch {
  int threads;
  size_t bytes;  // of a block's workspace
  bool in_shared;

  SymmetricEigsLaunch(int m, size_t most_shared)
      : threads(m <= 16   ? 32
                : m <= 32 ? 128
                          : 256),
        bytes(jacobi_workspace_bytes(m)),
        in_shared(bytes <= most_shared) {}
};

// The state of one neuron in the batched Lanczos solver, or the first of n; 6 is kSearchSpaceBlocks.
template <typename T>
struct SearchSpace {
  T *basis, *images;  // [6 k, d]
  double* projected;  // [6 k, 6 k], the lower triangle
  double* previous;   // [k, 6 k], the last Ritz vectors in the basis
  bool* dead;         // [6 k]
  T *norm, *unit;     // one each
};

}  // namespace growkernels::eigen
