#pragma once
// The family for bfloat16 on the CPU by packed tiles: the maps stay in cache until they are mixed.

#include "basis_conv/basis_conv.h"

namespace growkernels::basis_conv {

// y, and the maps beside it, all channels_last. With include_basis the maps are a part of y.
WithMaps tiles_forward(const Forward& call);

// Gradients of tensors that are wanted, undefined for others. Laid out as is most convenient.
Gradients tiles_backward(const Backward& call);

}  // namespace growkernels::basis_conv
