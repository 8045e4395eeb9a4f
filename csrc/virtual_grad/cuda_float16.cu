#include "virtual_grad/cuda_launch.h"
#include "virtual_grad/cuda_run.cuh"

namespace growkernels::virtual_grad::cuda {

void run_float16(const Call& call, TorchDevice& device) { Run<TorchDevice>(call, device).run<HalfTiles<Half>>(); }

}  // namespace growkernels::virtual_grad::cuda
