#pragma once
// What an op does to its tensors under autocast.

#include <ATen/autocast_mode.h>

namespace growkernels {

// In autocast's own dtype; a parameter's cast is kept until the end of the autocast block.
template <c10::DeviceType device>
at::Tensor lowered(const at::Tensor& tensor) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

}  // namespace growkernels
