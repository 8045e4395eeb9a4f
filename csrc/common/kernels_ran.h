#pragma once
// Which kernels have run in this process: the tests compare it with what the plans say.

#include <cstdint>

namespace growkernels {

enum class Ran : uint32_t {
  // Families' own, and what is composed of ATen's ops.
  Aten,
  Winograd,
  Pointwise,
  Tiles,
  Direct,
  TwoConvolutions,
  Reconstruct,
  VendorsProduct,
  Cuda,
  // Tile products (gemm_tile.h) and loops of our own, also inside of the former.
  Bfloat16Tiles,
  Portable,
};

// Called where a kernel is entered, from any thread. It costs a load.
void note(Ran kernel);

}  // namespace growkernels
