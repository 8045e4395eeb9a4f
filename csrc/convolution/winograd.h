#pragma once
// The three convolutions of a 3 x 3 layer of stride 1 by Winograd's F(4x4, 3x3), float32, on the CPU.

#include "convolution/images.h"
#include "convolution/winograd_transforms.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <functional>

namespace growkernels::convolution {

// The output, cut into tiles of 4 x 4 pixels; a strip is a row of tiles of one image.
struct Tiling {
  int64_t rows, columns, strips;

  Tiling(int64_t batch, int64_t height, int64_t width)
      : rows((height + tile_outputs - 1) / tile_outputs),
        columns((width + tile_outputs - 1) / tile_outputs),
        strips(batch * rows) {}

  // body(index from 0, image, first row, first column of the output) for the tiles of some strips.
  template <typename Body>
  void for_each(int64_t first_strip, int64_t last_strip, const Body& body) const {
    int64_t index = 0;
    for (int64_t strip = first_strip; strip < last_strip; ++strip) {
      for (int64_t column = 0; column < columns; ++column, ++index) {
        body(index, strip / rows, strip % rows * tile_outputs, column * tile_outputs);
      }
    }
  }
};

// The pixels of a size x size square, `outside` for those beyond the image.
template <int size, typename T>
void square_of_pixels(const Images<T>& images, int64_t image, int64_t y, int64_t x, T* outside, T** pixels) {
  for (int64_t i = 0; i < size; ++i) {
    const bool row_inside = y + i >= 0 && y + i < images.height;
    T* const row = row_inside ? images.pixel(image, y + i, 0) : outside;
    for (int64_t j = 0; j < size; ++j) {
      const bool inside = row_inside && x + j >= 0 && x + j < images.width;
      pixels[i * size + j] = inside ? row + (x + j) * images.pixel_stride : outside;
    }
  }
}

// The kernels as 36 matrices [inputs, outputs], in scratch memory of this thread.
at::Tensor transformed_kernels(const Kernels<const float>& kernels);

// out = convolution of `in` with `kernels`, the first output pixel's patch beginning `pad_y` pixels above
// and `pad_x` pixels left of the first input pixel; what lies outside counts as zeros.
// `finish(first, count)` is called on the thread that wrote the pixels [first, first + count) of `out`,
// while they are in its cache.
void winograd_convolution(const Images<const float>& in, const Kernels<const float>& kernels, int64_t pad_y,
                          int64_t pad_x, const Images<float>& out,
                          const std::function<void(int64_t first, int64_t count)>& finish);

// Frequencies of some tiles: frequency f of tile t is the row of channels at
// data + f * frequency_stride + t * channels.
template <typename T>
struct FrequencyRows {
  T* data;
  int64_t frequency_stride;
};

// Writes the gradient with respect to the output of the strips [first, last), as frequencies. Those of the
// patches of the same tiles are given. May share its work among threads.
using GradientOfStrips =
    std::function<void(int64_t first, int64_t last, FrequencyRows<const float> patches, FrequencyRows<float> gradient)>;

// The one that transforms tile by tile: body(image, first row, first column of the output, target, frequency
// stride) writes the frequencies of one tile, each a row of `channels` values.
template <typename Body>
GradientOfStrips tile_by_tile(const Tiling& tiling, int64_t channels, const Body& body) {
  return [=](int64_t first, int64_t last, FrequencyRows<const float>, FrequencyRows<float> gradient) {
    at::parallel_for(first, last, at::divup(last - first, at::get_num_threads()), [&](int64_t begin, int64_t end) {
      float* const rows = gradient.data + (begin - first) * tiling.columns * channels;
      tiling.for_each(begin, end, [&](int64_t tile, int64_t image, int64_t y, int64_t x) {
        body(image, y, x, rows + tile * channels, gradient.frequency_stride);
      });
    });
  };
}

// kernel_gradient = that of a loss with respect to the kernels of the convolution above, whose output is cut
// into tiles as `tiling` says.
void winograd_kernel_gradient(const Images<const float>& in, const Tiling& tiling, int64_t pad_y, int64_t pad_x,
                              const GradientOfStrips& output_gradient, const Kernels<float>& kernel_gradient);

// The same from the gradient with respect to the output as it lies in memory.
void winograd_kernel_gradient(const Images<const float>& in, const Images<const float>& output_gradient, int64_t pad_y,
                              int64_t pad_x, const Kernels<float>& kernel_gradient);

}  // namespace growkernels::convolution
