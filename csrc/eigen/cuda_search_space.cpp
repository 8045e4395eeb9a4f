// search_space_step_ on CUDA: checks and the launch.

#include "eigen/constants.h"
#include "eigen/cuda_launch.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>

namespace growkernels::eigen {
namespace {

void check_state(const char* name, const at::Tensor& state, at::ScalarType dtype, at::IntArrayRef shape,
                 const at::Tensor& product) {
  TORCH_CHECK(state.scalar_type() == dtype && state.sizes() == shape && state.is_contiguous() &&
                  state.device() == product.device(),
              "search_space_step_: got ", name, " of shape ", state.sizes(), ", dtype ", state.scalar_type(), " on ",
              state.device(), "; it must be contiguous, ", shape, ", ", dtype, " on ", product.device());
}

void search_space_step(const at::Tensor& basis, const at::Tensor& images, const at::Tensor& projected,
                       const at::Tensor& previous, const at::Tensor& dead, const at::Tensor& norms,
                       const at::Tensor& units, const at::Tensor& product, int64_t count) {
  TORCH_CHECK_VALUE(product.dim() == 3 && (product.size(1) == 1 || product.size(1) == 2),
                    "search_space_step_: got a product of shape ", product.sizes(),
                    "; pass [n, k, d] with k of 1 or 2");
  const int64_t n = product.size(0), k = product.size(1), d = product.size(2), columns = kSearchSpaceBlocks * k;
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(n <= most && columns * d <= most, "search_space_step_: got a product of shape ", product.sizes(),
                    "; n and 6 k d may be ", most, " at most");
  TORCH_CHECK_VALUE(count >= 0 && count + k <= columns, "search_space_step_: got count=", count,
                    "; a basis has room for ", columns, " columns");
  const at::ScalarType dtype = product.scalar_type();
  check_state("basis", basis, dtype, {n, columns, d}, product);
  check_state("images", images, dtype, {n, columns, d}, product);
  check_state("projected", projected, at::kDouble, {n, columns, columns}, product);
  check_state("previous", previous, at::kDouble, {n, k, columns}, product);
  check_state("dead", dead, at::kBool, {n, columns}, product);
  check_state("norms", norms, dtype, {n}, product);
  check_state("units", units, dtype, {n}, product);
  if (product.numel() == 0) {
    return;
  }
  const c10::cuda::CUDAGuard guard(product.device());
  const at::Tensor rows = product.contiguous();
  AT_DISPATCH_FLOATING_TYPES(dtype, "search_space_step_", [&] {
    const SearchSpace<scalar_t> space = {basis.mutable_data_ptr<scalar_t>(),   images.mutable_data_ptr<scalar_t>(),
                                         projected.mutable_data_ptr<double>(), previous.mutable_data_ptr<double>(),
                                         dead.mutable_data_ptr<bool>(),        norms.mutable_data_ptr<scalar_t>(),
                                         units.mutable_data_ptr<scalar_t>()};
    C10_CUDA_CHECK(launch_search_space_step(space, rows.const_data_ptr<scalar_t>(), static_cast<unsigned>(n),
                                            static_cast<int>(k), static_cast<int>(d), static_cast<int>(count),
                                            c10::cuda::getCurrentCUDAStream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CUDA, m) { m.impl("search_space_step_", &search_space_step); }

}  // namespace growkernels::eigen
