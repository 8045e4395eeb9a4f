// Shapes, dtypes and strides without data, for fake tensors, torch.compile and torch.export; on other devices the
// memory of the results, for kernels that are launched from Python.

#include "basis_conv/basis_conv.h"

#include <ATen/ops/empty.h>

namespace growkernels::basis_conv {
namespace {

at::Tensor empty_output(const Forward& call, c10::SymIntArrayRef shape) {
  return at::empty_symint(shape, call.x.options(), output_format(call.x, call.basis));
}

at::Tensor forward(const Forward& call) {
  return empty_output(call, output_shape(call.x, call.basis, call.coeff, call.form));
}

WithMaps with_maps(const Forward& call) {
  return {forward(call), empty_output(call, maps_shape(call.x, call.basis, call.form))};
}

Gradients backward(const Backward& call) {
  const auto empty = [&](bool wanted, c10::SymIntArrayRef shape, at::MemoryFormat format) {
    return wanted ? at::empty_symint(shape, call.x.options(), format) : at::Tensor();
  };
  const std::array<c10::SymInt, 1> channels = {call.grad.sym_size(1)};
  return {empty(call.wanted[0], call.x.sym_sizes(), call.x.suggest_memory_format()),
          empty(call.wanted[1], call.basis.sym_sizes(), call.basis.suggest_memory_format()),
          empty(call.wanted[2], call.coeff.sym_sizes(), at::MemoryFormat::Contiguous),
          empty(call.wanted[3], channels, at::MemoryFormat::Contiguous)};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Meta, m) { implement<checked<forward>, checked<with_maps>, checked<backward>>(m); }
TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  implement<checked<forward>, checked<with_maps>, checked<backward>>(m, "_outputs");
}

}  // namespace growkernels::basis_conv
