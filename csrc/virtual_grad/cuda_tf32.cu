#include "virtual_grad/cuda_launch.h"
#include "virtual_grad/cuda_run.cuh"

namespace growkernels::virtual_grad::cuda {

void run_tf32(const Call& call, TorchDevice& device) { Run<TorchDevice>(call, device).run<Tf32Tiles>(); }

}  // namespace growkernels::virtual_grad::cuda
