#pragma once
// The three convolutions of a 3 x 3 layer of stride 1 by Winograd's F(4x4, 3x3), float32, on the CPU.

#include "basis_conv/cpu_images.h"

#include <functional>

namespace growkernels::basis_conv {

// out = convolution of `in` with `kernels`, the first output pixel's patch beginning `pad_y` pixels above
// and `pad_x` pixels left of the first input pixel; what lies outside counts as zeros.
// `finish(first, count)` is called on the thread that wrote the pixels [first, first + count) of `out`,
// while they are in its cache.
void winograd_convolution(const Images<const float>& in, const Kernels<const float>& kernels, int64_t pad_y,
                          int64_t pad_x, const Images<float>& out,
                          const std::function<void(int64_t first, int64_t count)>& finish);

// gradient = that of a loss with respect to the kernels of the convolution above, from the gradient with
// respect to its output.
void winograd_weight_gradient(const Images<const float>& in, const Images<const float>& out_gradient, int64_t pad_y,
                              int64_t pad_x, const Kernels<float>& gradient);

}  // namespace growkernels::basis_conv
