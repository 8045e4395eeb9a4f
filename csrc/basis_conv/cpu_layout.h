#pragma once
// float32 images between contiguous and channels_last order: ATen's copy is made for any strides and takes
// a multiple of the time.

#include <ATen/core/Tensor.h>

namespace growkernels::basis_conv {

// The tensor itself where it is laid out like that already.
at::Tensor to_channels_last(const at::Tensor& images);
at::Tensor to_contiguous(const at::Tensor& images);

}  // namespace growkernels::basis_conv
