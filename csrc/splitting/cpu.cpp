// The matrix products of the family on the CPU: arguments in, the kernel of the right element type,
// results out.

#include "splitting/cpu_kernel.h"
#include "splitting/cpu_winograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace growkernels::splitting {
namespace {

constexpr int64_t vendor_rows_at_a_time = 4096;

// y [n, k, width] for a problem whose sizes may be zero. rounded: float32 by bfloat16 tiles.
at::Tensor solve(const Problem& problem, bool rounded = false) {
  if (problem.rows() == 0 || problem.v.numel() == 0) {
    return at::zeros(problem.v.sizes(), problem.v.options());
  }
  at::Tensor y = at::empty(problem.v.sizes(), problem.v.options());
  if (rounded) {
    run_rounded_kernel(problem, y);
  } else if (y.element_size() == 2) {
    run_16_bit_kernel(problem, y);
  } else {
    run_wide_kernel(problem, y);
  }
  return y;
}

// P = X V^T, P *= W, P^T X, some thousand rows at a time.
at::Tensor vendors_products(const Hvp& call) {
  note(Ran::VendorsProduct);
  const int64_t rows = call.x.size(0), neurons = call.w.size(1);
  const at::Tensor vectors = call.v.dim() == 2 ? call.v : call.v.flatten(0, 1);
  at::Tensor y;
  int64_t first = 0;
  do {
    const int64_t count = std::min(vendor_rows_at_a_time, rows - first);
    const at::Tensor x = call.x.narrow(0, first, count), w = call.w.narrow(0, first, count);
    at::Tensor products = at::mm(x, vectors.t());
    products.view({count, neurons, vectors.size(0) / neurons}).mul_(w.unsqueeze(2));
    if (first == 0) {
      y = at::mm(products.t(), x);
    } else {
      y.addmm_(products.t(), x);
    }
    first += count;
  } while (first < rows);
  return y.view(call.v.sizes());
}

at::Tensor hvp(const Hvp& call) {
  const at::Tensor &x = call.x, &w = call.w, &v = call.v;
  const bool rounded = x.scalar_type() == at::kFloat && tiles_obstacle(at::kFloat, call.full_precision) == nullptr;
  if (!rounded && vendor_obstacle(call) == nullptr) {
    return vendors_products(call);
  }
  Problem problem;
  problem.x = x.t().unsqueeze(0).unsqueeze(2);  // [1, d, 1, M]
  problem.w = w.t().unsqueeze(0);
  problem.v = (v.dim() == 2 ? v.unsqueeze(1) : v).contiguous();
  return solve(problem, rounded).view(v.sizes());
}

at::Tensor hvp_conv2d(const HvpConv2d& call, const Sliding& sliding) {
  const at::Tensor &x = call.x, &w = call.w, &v = call.v;
  Problem problem;
  problem.sliding = sliding;
  const at::Tensor filters = v.dim() == 4 ? v.unsqueeze(1) : v;  // [n, k, C, kh, kw]
  if (winograd_obstacle(x, w, filters, problem.sliding) == nullptr) {
    return winograd_hvp(x, w, filters, problem.sliding.padding).view(v.sizes());
  }
  problem.kernel_height = filters.size(3);
  problem.kernel_width = filters.size(4);
  problem.out_width = w.size(3);
  problem.x = problem.one_tap() ? x.flatten(2).unsqueeze(2) : x;  // a copy where pixels lie at uneven distances
  problem.w = w.flatten(2);
  const at::Tensor taps_first = filters.permute({0, 1, 3, 4, 2}).contiguous();
  problem.v = taps_first.flatten(2);
  return solve(problem).view(taps_first.sizes()).permute({0, 1, 4, 2, 3}).contiguous().view(v.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CPU, m) {
  m.impl("splitting_hvp", &Unpacked<Hvp>::run<checked<hvp>>);
  m.impl("splitting_hvp_conv2d", &Unpacked<HvpConv2d>::run<checked<hvp_conv2d>>);
}

}  // namespace growkernels::splitting
