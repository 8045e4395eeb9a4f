#include "virtual_grad/cpu_kernel.h"

namespace growkernels::virtual_grad {

std::vector<Tile> run_wide_kernel(std::vector<Position>& positions, const Kind& kind, Store store) {
  if (positions[0].h.scalar_type() == at::kDouble) {
    return Kernel<double, double>(positions, kind, store).run();
  }
  return Kernel<float, float>(positions, kind, store).run();
}

}  // namespace growkernels::virtual_grad
