// symmetric_eigs on CUDA: shapes, memory and the launch.

#include "splitting/cuda_small_eigen.cuh"
#include "splitting/small_eigen_op.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

namespace growkernels::splitting {
namespace {

// cuSOLVER, which makes the host wait, is faster beyond; so many rows serve 42 eigenpairs.
constexpr int64_t kMostRows = 256;

template <typename T, typename Group, bool in_shared>
void launch(const EigenLaunch& plan, const at::Tensor& a, const at::Tensor& values, const at::Tensor& vectors) {
  const int64_t n = a.size(0), m = a.size(1);
  const auto kernel = &symmetric_eigs_kernel<T, Group, in_shared>;
  int64_t blocks = n;
  at::Tensor memory;
  unsigned char* global = nullptr;
  if constexpr (in_shared) {
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.bytes)));
    // The runtime's limit for a grid's first dimension; a block takes several matrices beyond.
    blocks = std::min<int64_t>(n, std::numeric_limits<int32_t>::max());
  } else {
    // Workspaces for the blocks that run at a time, not for all matrices.
    int processors = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, a.device().index()));
    blocks = std::min<int64_t>(n, 2 * processors);
    memory = at::empty({blocks * static_cast<int64_t>(plan.bytes)}, a.options().dtype(at::kByte));
    global = memory.mutable_data_ptr<uint8_t>();
  }
  kernel<<<static_cast<unsigned>(blocks), plan.threads, in_shared ? plan.bytes : 0,
           c10::cuda::getCurrentCUDAStream()>>>(a.const_data_ptr<T>(), values.mutable_data_ptr<T>(),
                                                vectors.mutable_data_ptr<T>(), n, static_cast<int>(m), global);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> symmetric_eigs(const at::Tensor& a) {
  check_matrices(a);
  const int64_t n = a.size(0), m = a.size(1);
  if (m > kMostRows) {
    return eigs_by_torch(a);
  }
  at::Tensor values = at::empty({n, m}, a.options()), vectors = at::empty({n, m, m}, a.options());
  if (values.numel() == 0) {
    return {values, vectors};
  }
  const c10::cuda::CUDAGuard guard(a.device());
  const at::Tensor matrices = a.contiguous();
  const EigenLaunch plan(static_cast<int>(m));
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "symmetric_eigs", [&] {
    if (plan.threads == 32) {
      launch<scalar_t, OneWarp, true>(plan, matrices, values, vectors);
    } else if (plan.in_shared) {
      launch<scalar_t, WholeBlock, true>(plan, matrices, values, vectors);
    } else {
      launch<scalar_t, WholeBlock, false>(plan, matrices, values, vectors);
    }
  });
  return {values, vectors};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CUDA, m) { m.impl("symmetric_eigs", &symmetric_eigs); }

}  // namespace growkernels::splitting
