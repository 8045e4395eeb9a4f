#pragma once
// Images on the CPU, float32 or of 16 bits: between contiguous and channels_last order (ATen's copy is made for any
// strides and takes a multiple of the time), and from tensors to the kernels' views.

#include "convolution/images.h"

#include <ATen/core/Tensor.h>

namespace growkernels::convolution {

// The tensor itself where it is laid out like that already.
at::Tensor to_channels_last(const at::Tensor& images);
at::Tensor to_contiguous(const at::Tensor& images);

// Channels_last tensors, and slices of their channels, are used where they lie; others are copied.
bool has_adjacent_channels(const at::Tensor& tensor);
at::Tensor with_adjacent_channels(const at::Tensor& tensor);

// Of what with_adjacent_channels returned.
Images<const float> images(const at::Tensor& tensor);

template <typename T>
Images<const T> images_of(const at::Tensor& tensor) {
  // Strides of size-1 dimensions say nothing.
  const bool dense = tensor.is_contiguous(at::MemoryFormat::ChannelsLast);
  return {tensor.const_data_ptr<T>(),
          tensor.size(0),
          tensor.size(2),
          tensor.size(3),
          tensor.size(1),
          dense ? tensor.size(1) : tensor.stride(3)};
}

// [outputs, inputs, height, width] at `data`, laid out as `kernels` is.
template <typename T>
Kernels<T> kernels_like(const at::Tensor& kernels, T* data) {
  return {data,
          kernels.size(0),
          kernels.size(1),
          kernels.stride(0),
          kernels.stride(1),
          kernels.stride(2),
          kernels.stride(3)};
}

}  // namespace growkernels::convolution
