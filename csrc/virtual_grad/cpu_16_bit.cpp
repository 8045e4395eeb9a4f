#include "virtual_grad/cpu_kernel.h"

namespace growkernels::virtual_grad {

std::vector<Tile> run_16_bit_kernel(std::vector<Position>& positions, const Kind& kind, Store store) {
  if (positions[0].h.scalar_type() == at::kHalf) {
    return Kernel<at::Half, float>(positions, kind, store).run();
  }
  if (tile_dtype(at::kBFloat16) == at::kBFloat16) {
    return Kernel<at::BFloat16, at::BFloat16>(positions, kind, store).run();
  }
  return Kernel<at::BFloat16, float>(positions, kind, store).run();
}

}  // namespace growkernels::virtual_grad
