// symmetric_eigs on CUDA: shapes, memory and the launch.

#include "common/kernels_ran.h"
#include "eigen/cuda_launch.h"
#include "eigen/eigen.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

namespace growkernels::eigen {
namespace {

int attribute(const at::Tensor& a, cudaDeviceAttr name) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, a.device().index()));
  return value;
}

std::tuple<at::Tensor, at::Tensor> symmetric_eigs(const at::Tensor& a, std::optional<int64_t> k) {
  check_matrices(a);
  const int64_t n = a.size(0), m = a.size(1), pairs = check_pairs(a, k);
  if (cuda_obstacle(a) != nullptr) {
    return eigs_by_torch(a, k);
  }
  at::Tensor values = at::empty({n, m}, a.options()), vectors = at::empty({n, m, m}, a.options());
  if (values.numel() == 0) {
    return {values.narrow(1, 0, pairs), vectors.narrow(1, 0, pairs)};
  }
  note(Ran::Cuda);
  const c10::cuda::CUDAGuard guard(a.device());
  const at::Tensor matrices = a.contiguous();
  const SymmetricEigsLaunch plan(static_cast<int>(m), attribute(a, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  // The runtime's limit for a grid's first dimension; a block takes several matrices beyond.
  int64_t blocks = std::min<int64_t>(n, std::numeric_limits<int32_t>::max());
  at::Tensor workspaces;
  if (!plan.in_shared) {
    // For the blocks that run at a time, not for all matrices.
    blocks = std::min<int64_t>(n, 2 * attribute(a, cudaDevAttrMultiProcessorCount));
    workspaces = at::empty({blocks * static_cast<int64_t>(plan.bytes)}, a.options().dtype(at::kByte));
  }
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "symmetric_eigs", [&] {
    C10_CUDA_CHECK(launch_symmetric_eigs(
        plan, static_cast<unsigned>(blocks), matrices.const_data_ptr<scalar_t>(), values.mutable_data_ptr<scalar_t>(),
        vectors.mutable_data_ptr<scalar_t>(), n, static_cast<int>(m),
        plan.in_shared ? nullptr : workspaces.mutable_data_ptr<uint8_t>(), c10::cuda::getCurrentCUDAStream()));
  });
  // All are computed; whoever asks for fewer saves nothing but memory.
  return {values.narrow(1, 0, pairs).contiguous(), vectors.narrow(1, 0, pairs).contiguous()};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CUDA, m) { m.impl("symmetric_eigs", &symmetric_eigs); }

}  // namespace growkernels::eigen
