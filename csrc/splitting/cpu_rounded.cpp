#include "splitting/cpu_kernel.h"

namespace growkernels::splitting {

void run_rounded_kernel(const Problem& problem, const at::Tensor& y) {
  Kernel<float, at::BFloat16>(problem, y.mutable_data_ptr<float>()).run();
}

}  // namespace growkernels::splitting
