#pragma once
// Views of images and kernels that the CPU kernels work on.

#include <cstdint>

namespace growkernels::convolution {

// Images in channels_last order: pixels follow each other `pixel_stride` apart and hold `channels` values.
template <typename T>
struct Images {
  T* data;
  int64_t batch, height, width, channels, pixel_stride;
  int64_t pixels() const { return batch * height * width; }
  T* pixel(int64_t image, int64_t y, int64_t x) const {
    return data + ((image * height + y) * width + x) * pixel_stride;
  }
};

// Element (ky, kx) of the kernel from channel `in` to channel `out` is
// data[out * out_stride + in * in_stride + ky * row_stride + kx * tap_stride].
template <typename T>
struct Kernels {
  T* data;
  int64_t outputs, inputs, out_stride, in_stride, row_stride, tap_stride;
};

}  // namespace growkernels::convolution
