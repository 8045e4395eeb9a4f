#include "virtual_grad/cpu_winograd.h"

#include "common/kernels_ran.h"
#include "convolution/algorithm.h"
#include "convolution/layout.h"
#include "convolution/winograd.h"

#include <ATen/ops/empty.h>

#include <vector>

namespace growkernels::virtual_grad {

using namespace convolution;

namespace {

// The gradient at 16 pixels, unless h <= 0, as frequencies.
struct MaskTile {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* const* h, const float* const* g, float* out,
                                                int64_t frequency_stride, int64_t channels) {
    for_channel_vectors<bytes>(channels, [&](int64_t c, auto zero) __attribute__((always_inline)) {
      using V = decltype(zero);
      transform_square<GradientTransform, V>(
          [&](int p, V& value) __attribute__((always_inline)) {
            const V activation = *reinterpret_cast<const V*>(h[p] + c),
                    gradient = *reinterpret_cast<const V*>(g[p] + c);
            value = activation <= V{} ? V{} : gradient;
          },
          [&](int f, const V& value)
              __attribute__((always_inline)) { *reinterpret_cast<V*>(out + f * frequency_stride + c) = value; });
    });
  }
};

}  // namespace

const char* winograd_obstacle(const at::Tensor& h) {
  if (h.scalar_type() != at::kFloat) {
    return "it is for float32";
  }
  return h.numel() == 0 ? "there are no images"
                        : convolution::winograd_obstacle({h.size(1), h.size(1), h.size(0), h.size(2), h.size(3)});
}

at::Tensor winograd_gradient(const at::Tensor& h, const at::Tensor& g) {
  note(Ran::Winograd);
  const at::Tensor adjacent_h = with_adjacent_channels(h), adjacent_g = with_adjacent_channels(g);
  const Images<const float> activations = images(adjacent_h), gradients = images(adjacent_g);
  const int64_t channels = h.size(1);
  const Tiling tiling(gradients.batch, gradients.height, gradients.width);
  const std::vector<float> zeros(channels, 0.f);
  const auto transform = [&](int64_t image, int64_t y, int64_t x, float* target, int64_t frequency_stride) {
    const float *h_pixels[tile_outputs * tile_outputs], *g_pixels[tile_outputs * tile_outputs];
    square_of_pixels<tile_outputs>(activations, image, y, x, zeros.data(), h_pixels);
    square_of_pixels<tile_outputs>(gradients, image, y, x, zeros.data(), g_pixels);
    widest<MaskTile>(h_pixels, g_pixels, target, frequency_stride, channels);
  };
  at::Tensor gradient = at::empty({channels, channels, 3, 3}, h.options());
  winograd_kernel_gradient(activations, tiling, 1, 1, tile_by_tile(tiling, channels, transform),
                           kernels_like(gradient, gradient.mutable_data_ptr<float>()));
  return gradient;
}

}  // namespace growkernels::virtual_grad
