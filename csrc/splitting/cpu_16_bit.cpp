#include "splitting/cpu_kernel.h"

namespace growkernels::splitting {

void run_16_bit_kernel(const Problem& problem, const at::Tensor& y) {
  if (y.scalar_type() == at::kHalf) {
    Kernel<at::Half, float>(problem, y.mutable_data_ptr<at::Half>()).run();
  } else if (tile_dtype(at::kBFloat16) == at::kBFloat16) {
    Kernel<at::BFloat16, at::BFloat16>(problem, y.mutable_data_ptr<at::BFloat16>()).run();
  } else {
    Kernel<at::BFloat16, float>(problem, y.mutable_data_ptr<at::BFloat16>()).run();
  }
}

}  // namespace growkernels::splitting
