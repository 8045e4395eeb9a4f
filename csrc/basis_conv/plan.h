#pragma once
// Which algorithm computes a call: the one place where that is decided.

#include "basis_conv/basis_conv.h"
#include "common/plan.h"

namespace growkernels::basis_conv {

enum class Algorithm {
  Winograd,         // our F(4x4, 3x3) in both directions, the combinations mixed in while in cache
  Pointwise,        // our tile products for a 1 x 1 kernel and for the combinations, in one pass
  Tiles,            // our direct convolution of bfloat16 in both directions, the combinations mixed in while in cache
  Direct,           // the vendor's convolution for the maps, our one pass for the combinations
  TwoConvolutions,  // the vendor's convolutions for both
  Reconstruct,      // one vendor's convolution with the full kernel
};

const char* name(Algorithm algorithm);

// Of the last two, for tensors that check_forward accepts.
Algorithm composed_algorithm(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff, const Form& form);

// On this device, for tensors like these, which may be elsewhere or have no data. Forward and backward use the same
// algorithm.
Algorithm choose_algorithm(at::DeviceType device, const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                           const Form& form, Refused* refused = nullptr);

}  // namespace growkernels::basis_conv
