#pragma once
// What a call computes, without torch: kernels that know nothing of tensors share these names.

#include "common/activation.h"

namespace growkernels::virtual_grad {

enum class Layer { LinearRelu, Residual, Conv2dRelu, Linear };

struct Kind {
  Layer layer;
  Activation activation;  // of Residual
  double scale;           // of Residual
};

// What happens to G: only its norm is wanted, or it is written, or added to a buffer.
enum class Store { Nothing, Write, Accumulate };

}  // namespace growkernels::virtual_grad
