// Shapes and dtypes without data, for fake tensors, torch.compile and torch.export.

#include "virtual_grad/virtual_grad.h"

#include <ATen/ops/empty.h>

namespace growkernels::virtual_grad {
namespace {

at::Tensor norms(const Positions& call, const Kind&) {
  const at::Tensor& first = call.inputs[0];
  return at::empty({static_cast<int64_t>(call.inputs.size())},
                   first.options().dtype(gradient_dtype(first.scalar_type())));
}

Gradients gradients(const Positions& call, const Kind& kind) {
  Gradients out;
  for (size_t l = 0; l < call.inputs.size(); ++l) {
    const at::Tensor& h = call.inputs[l];
    out.push_back(
        at::empty_symint(gradient_shape(h, call.grads[l], kind), h.options().dtype(gradient_dtype(h.scalar_type()))));
  }
  return out;
}

at::Tensor accumulate(const Accumulation& call, const Kind& kind) { return norms(call, kind); }

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Meta, m) { implement<checked<gradients>, checked<norms>, checked<accumulate>>(m); }

}  // namespace growkernels::virtual_grad
