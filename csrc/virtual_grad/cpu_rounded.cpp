#include "virtual_grad/cpu_kernel.h"

namespace growkernels::virtual_grad {

std::vector<Tile> run_rounded_kernel(std::vector<Position>& positions, const Kind& kind, Store store) {
  return Kernel<float, at::BFloat16>(positions, kind, store).run();
}

}  // namespace growkernels::virtual_grad
