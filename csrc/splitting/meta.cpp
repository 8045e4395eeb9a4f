// Shapes and dtypes without data, for fake tensors, torch.compile and torch.export; on other devices the memory of the
// results, for kernels that are launched from Python.

#include "splitting/splitting.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace growkernels::splitting {
namespace {

at::Tensor weight(const Weight& call, const Curvature&) { return at::empty_like(call.preact); }

at::Tensor hvp(const Hvp& call) { return at::empty_symint(call.v.sym_sizes(), call.v.options()); }

at::Tensor hvp_conv2d(const HvpConv2d& call, const Sliding&) {
  return at::empty_symint(call.v.sym_sizes(), call.v.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Meta, m) { implement<checked<weight>, checked<hvp>, checked<hvp_conv2d>>(m); }
TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  implement<checked<weight>, checked<hvp>, checked<hvp_conv2d>>(m, "_outputs");
}

}  // namespace growkernels::splitting
