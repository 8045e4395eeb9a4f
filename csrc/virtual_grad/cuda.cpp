// The ops on CUDA: arguments in, the kernels of the right dtype, results out.

#include "common/kernels_ran.h"
#include "virtual_grad/cuda_launch.h"
#include "virtual_grad/virtual_grad.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

namespace growkernels::virtual_grad {
namespace cuda {
namespace {

int attribute(int device, cudaDeviceAttr name) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

}  // namespace

struct TorchDevice::Workspaces {
  at::TensorOptions options;
  std::vector<at::Tensor> tensors;
};

TorchDevice::TorchDevice(int index)
    : multiprocessors(attribute(index, cudaDevAttrMultiProcessorCount)),
      shared_bytes(attribute(index, cudaDevAttrMaxSharedMemoryPerBlockOptin)),
      workspaces_(std::make_unique<Workspaces>()) {
  workspaces_->options = at::TensorOptions().device(at::kCUDA, static_cast<c10::DeviceIndex>(index)).dtype(at::kByte);
}

TorchDevice::~TorchDevice() = default;

void* TorchDevice::workspace(size_t bytes) {
  workspaces_->tensors.push_back(at::empty({static_cast<int64_t>(bytes)}, workspaces_->options));
  return workspaces_->tensors.back().mutable_data_ptr();
}

void TorchDevice::launch(void (*kernel)(Table), int blocks, int threads, int shared, const Table& table) {
  if (shared > 48 << 10) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  }
  void* arguments[] = {const_cast<Table*>(&table)};
  C10_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments, shared,
                                  c10::cuda::getCurrentCUDAStream()));
}

}  // namespace cuda

namespace {

bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// `gradients` is empty where nothing is stored. `norms` and `second_moments` may be undefined.
void run(const Positions& positions, const Kind& kind, Store store, at::TensorList gradients, const at::Tensor& norms,
         const at::Tensor& second_moments) {
  note(Ran::Cuda);
  const at::TensorList inputs = positions.inputs, grads = positions.grads;
  std::vector<at::Tensor> rows;  // keeps copies alive
  cuda::Call call{{}, kind, store, nullptr, nullptr, 0};
  for (size_t l = 0; l < inputs.size(); ++l) {
    const at::Tensor h = as_rows(inputs[l]), g = as_rows(grads[l]);
    TORCH_CHECK_VALUE(h.size(1) <= cuda::widest, "virtual_grad: inputs[", l, "] has ", h.size(1),
                      " features; CUDA kernels take at most ", cuda::widest);
    call.inputs.push_back({h.const_data_ptr(), g.const_data_ptr(),
                           store == Store::Nothing ? nullptr : gradients[l].mutable_data_ptr(), h.stride(0),
                           g.stride(0), h.size(0), static_cast<int>(h.size(1))});
    rows.push_back(h);
    rows.push_back(g);
  }
  if (norms.defined()) {
    call.norms = norms.mutable_data_ptr<float>();
  }
  if (second_moments.defined()) {
    call.second_moments = second_moments.mutable_data_ptr<float>();
    call.second_moments_stride = second_moments.stride(0);
  }
  const c10::cuda::CUDAGuard guard(inputs[0].device());
  cuda::TorchDevice device(inputs[0].device().index());
  switch (inputs[0].scalar_type()) {
    case at::kBFloat16:
      return cuda::run_bfloat16(call, device);
    case at::kHalf:
      return cuda::run_float16(call, device);
    default:
      return tf32_allowed() ? cuda::run_tf32(call, device) : cuda::run_float32(call, device);
  }
}

// The vendor multiplies 16-bit operands as they are and writes the sums in float32.
at::Tensor vendor_gradient(const at::Tensor& h, const at::Tensor& g, const Kind& kind) {
  if (kind.layer != Layer::Linear || h.element_size() != 2) {
    return aten_gradient(h, g, kind);
  }
  note(Ran::Aten);
  return at::mm(g.flatten(0, -2).t(), h.flatten(0, -2), at::kFloat);
}

at::Tensor empty_norms(at::TensorList inputs) {
  return at::empty({static_cast<int64_t>(inputs.size())}, inputs[0].options().dtype(at::kFloat));
}

at::Tensor norms(const Positions& call, const Kind& kind) {
  if (cuda_obstacle(call.inputs[0].scalar_type(), kind) != nullptr) {
    return norms_one_by_one(call, kind, vendor_gradient);
  }
  const at::Tensor norms = empty_norms(call.inputs);
  run(call, kind, Store::Nothing, {}, norms, {});
  return norms;
}

Gradients gradients(const Positions& call, const Kind& kind) {
  if (cuda_obstacle(call.inputs[0].scalar_type(), kind) != nullptr) {
    return gradients_one_by_one(call, kind, vendor_gradient);
  }
  Gradients out;
  for (const at::Tensor& h : call.inputs) {
    out.push_back(at::empty({h.size(-1), h.size(-1)}, h.options().dtype(at::kFloat)));
  }
  run(call, kind, Store::Write, out, {}, {});
  return out;
}

at::Tensor accumulate(const Accumulation& call, const Kind& kind) {
  if (cuda_obstacle(call.inputs[0].scalar_type(), kind) != nullptr) {
    return accumulate_one_by_one(call, kind, vendor_gradient);
  }
  const at::Tensor norms = empty_norms(call.inputs);
  run(call, kind, Store::Accumulate, call.sums, norms, call.second_moments.value_or(at::Tensor()));
  return norms;
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CUDA, m) { implement<checked<gradients>, checked<norms>, checked<accumulate>>(m); }

}  // namespace growkernels::virtual_grad
