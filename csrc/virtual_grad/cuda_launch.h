#pragma once
// Torch's side of a launch: memory from its allocator, its current stream. No kernels here: what includes
// torch's headers is left to the C++ compiler, which has them precompiled; nvcc takes them three times.

#include "virtual_grad/cuda_plan.h"

#include <memory>

namespace growkernels::virtual_grad::cuda {

// The current device.
class TorchDevice {
 public:
  explicit TorchDevice(int index);
  ~TorchDevice();

  const int multiprocessors, shared_bytes;

  // Freed with this object: torch gives it to nobody before the kernels launched until then have run.
  void* workspace(size_t bytes);
  void launch(void (*kernel)(Table), int blocks, int threads, int shared, const Table& table);

 private:
  struct Workspaces;
  std::unique_ptr<Workspaces> workspaces_;
};

// Compiled in files of their own.
void run_bfloat16(const Call& call, TorchDevice& device);
void run_float16(const Call& call, TorchDevice& device);
void run_float32(const Call& call, TorchDevice& device);
void run_tf32(const Call& call, TorchDevice& device);

}  // namespace growkernels::virtual_grad::cuda
