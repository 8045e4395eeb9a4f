// How symmetric_eigs would be computed.

#include "common/plan.h"
#include "eigen/constants.h"
#include "eigen/eigen.h"

#include <torch/library.h>

namespace growkernels::eigen {

const char* cuda_obstacle(const at::Tensor& a) {
  // So many rows serve 42 eigenpairs.
  return a.size(1) > 256 ? "beyond 256 rows cuSOLVER is faster, although it makes the host wait" : nullptr;
}

namespace {

Choice symmetric_eigs_plan(const at::Tensor& a, at::Device device) {
  check_matrices(a);
  Refused refused;
  if (device.is_cuda()) {
    return {takes("cuda", cuda_obstacle(a), &refused) ? "cuda" : "aten", refused};
  }
  return {device.is_cpu() ? "portable" : "aten", refused};
}

int64_t search_space_blocks() { return kSearchSpaceBlocks; }

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CatchAll, m) { m.impl("search_space_blocks", &search_space_blocks); }

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) { m.impl("symmetric_eigs_plan", &symmetric_eigs_plan); }

}  // namespace growkernels::eigen
