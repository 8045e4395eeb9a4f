#include "virtual_grad/cuda_launch.h"
#include "virtual_grad/cuda_run.cuh"

namespace growkernels::virtual_grad::cuda {

void run_bfloat16(const Call& call, TorchDevice& device) { Run<TorchDevice>(call, device).run<HalfTiles<BFloat16>>(); }

}  // namespace growkernels::virtual_grad::cuda
