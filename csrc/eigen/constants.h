#pragma once
// What the kernels of the family agree on, whatever they are written for.

namespace growkernels::eigen {

// Rotations stop when every off-diagonal element is this small beside the largest element.
inline constexpr double kJacobiTolerance = 0x1p-54;
// Convergence is quadratic: six to nine sweeps do. The limit only ends a matrix that holds NaN.
inline constexpr int kJacobiSweeps = 40;

// A full basis of the batched Lanczos solver, growkernels/solvers/search_space.py, has so many blocks of k
// directions.
inline constexpr int kSearchSpaceBlocks = 6;

}  // namespace growkernels::eigen
