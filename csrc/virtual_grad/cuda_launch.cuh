#pragma once
// Torch's side of a launch: memory from its allocator, its current stream.

#include "virtual_grad/cuda_run.cuh"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace growkernels::virtual_grad::cuda {

// The current device.
class TorchDevice {
 public:
  explicit TorchDevice(c10::Device device)
      : multiprocessors(attribute(device, cudaDevAttrMultiProcessorCount)),
        shared_bytes(attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin)),
        options_(at::TensorOptions().device(device).dtype(at::kByte)) {}

  const int multiprocessors, shared_bytes;

  // Freed with this object: torch gives it to nobody before the kernels launched until then have run.
  void* workspace(size_t bytes) {
    workspaces_.push_back(at::empty({static_cast<int64_t>(bytes)}, options_));
    return workspaces_.back().mutable_data_ptr();
  }

  void launch(void (*kernel)(Table), int blocks, int threads, int shared, const Table& table) {
    if (shared > 48 << 10) {
      C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    }
    kernel<<<blocks, threads, shared, c10::cuda::getCurrentCUDAStream()>>>(table);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  static int attribute(c10::Device device, cudaDeviceAttr name) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device.index()));
    return value;
  }

  at::TensorOptions options_;
  std::vector<at::Tensor> workspaces_;
};

// Compiled in files of their own.
void run_bfloat16(const Call& call, TorchDevice& device);
void run_float16(const Call& call, TorchDevice& device);
void run_float32(const Call& call, TorchDevice& device);
void run_tf32(const Call& call, TorchDevice& device);

}  // namespace growkernels::virtual_grad::cuda
