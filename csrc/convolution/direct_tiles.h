#pragma once
// Direct convolutions of bfloat16 images by packed tiles (bfloat16_tile_sums.h), on the CPU. Sums over taps and
// channels are complete before they leave the registers, in float32.
//
// Several images are taken side by side: a pixel's place in a packed row is column * images + image. Where there are
// 32 images, a tile of A is one pixel of them all, and taps that fall outside of the images cost nothing.

#include "common/bfloat16_tile_sums.h"
#include "convolution/axis_map.h"
#include "convolution/images.h"

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>

namespace growkernels::convolution {

constexpr int64_t block_pixels = 2 * packed_rows, block_columns = 2 * packed_columns;

// Takes 32 pixels of the output at a time, in a worker of its own for each thread.
class Sink {
 public:
  virtual ~Sink() = default;
  // Blocks that are under way at once have slots below `slots`.
  virtual void begin(int64_t slots) { static_cast<void>(slots); }
  // Sums [32 pixels, 32 channels] from channel 32 * column. `pixels` are the outputs' numbers, -1 for none.
  virtual void take(int64_t slot, int64_t column, const float* sums, const int64_t* pixels) = 0;
  // A slot has got all of its channels.
  virtual void finish(const TileSums& tiles, int64_t slot, const int64_t* pixels) {
    static_cast<void>(tiles), static_cast<void>(slot), static_cast<void>(pixels);
  }
};

using MakeSink = std::function<std::unique_ptr<Sink>()>;

// The output of `in` with `kernels` [outputs, inputs, y.kernel, x.kernel], one of whose channel strides is 1.
void direct_tiles_convolution(const Images<const c10::BFloat16>& in, const Kernels<const c10::BFloat16>& kernels,
                              const Sliding& y, const Sliding& x, int64_t out_height, int64_t out_width,
                              const MakeSink& make_sink);

// The gradient of `in` from that of the output; `kernels` are still from the input's channels to the output's. The
// pixels that sinks take are those of `in_height` x `in_width`.
void direct_tiles_input_gradient(const Images<const c10::BFloat16>& gradient,
                                 const Kernels<const c10::BFloat16>& kernels, const Sliding& y, const Sliding& x,
                                 int64_t in_height, int64_t in_width, const MakeSink& make_sink);

// The gradient of the kernels, which are written in any strides, rounded once.
void direct_tiles_kernel_gradient(const Images<const c10::BFloat16>& in, const Images<const c10::BFloat16>& gradient,
                                  const Sliding& y, const Sliding& x, const Kernels<c10::BFloat16>& kernel_gradient);

}  // namespace growkernels::convolution
