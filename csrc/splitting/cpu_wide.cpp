#include "splitting/cpu_kernel.h"

namespace growkernels::splitting {

void run_wide_kernel(const Problem& problem, const at::Tensor& y) {
  if (y.scalar_type() == at::kDouble) {
    Kernel<double, double>(problem, y.mutable_data_ptr<double>()).run();
  } else {
    Kernel<float, float>(problem, y.mutable_data_ptr<float>()).run();
  }
}

}  // namespace growkernels::splitting
