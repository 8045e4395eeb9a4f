#include "virtual_grad/cuda_launch.h"
#include "virtual_grad/cuda_run.cuh"

namespace growkernels::virtual_grad::cuda {

void run_float32(const Call& call, TorchDevice& device) { Run<TorchDevice>(call, device).run<FloatTiles>(); }

}  // namespace growkernels::virtual_grad::cuda
