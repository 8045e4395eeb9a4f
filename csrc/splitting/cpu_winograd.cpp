// Both products of splitting_hvp_conv2d share the transformed patches: the frequencies of a group of tiles
// are multiplied by the filters, taken back to pixels, weighted there, transformed as an output's gradient
// and multiplied by the same patches again, all in cache.

#include "splitting/cpu_winograd.h"

#include "common/gemm_tile.h"
#include "common/kernels_ran.h"
#include "common/workspace.h"
#include "convolution/algorithm.h"
#include "convolution/layout.h"
#include "convolution/winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <vector>

namespace growkernels::splitting {

using namespace convolution;

namespace {

struct Products;  // owner of a workspace

constexpr int64_t most_matrix_floats = int64_t{1} << 22;  // 16 MiB for the filters of a call, and for their sums
constexpr int64_t most_copied_bytes = int64_t{1} << 24;   // of images in another layout, at a time

// Products of one tile, as frequencies, to the weighted products as an output's gradient. `weights` are the
// 16 pixels' rows.
struct WeightTile {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* products, const float* const* weights, float* weighted,
                                                int64_t frequency_stride, int64_t channels) {
    for_channel_vectors<bytes>(channels, [&](int64_t c, auto zero) __attribute__((always_inline)) {
      using V = decltype(zero);
      V pixels[tile_outputs * tile_outputs];
      transform_square<OutputTransform, V>(
          [&](int f, V& value) __attribute__((always_inline)) {
            value = *reinterpret_cast<const V*>(products + f * frequency_stride + c);
          },
          [&](int p, const V& value)
              __attribute__((always_inline)) { pixels[p] = value * *reinterpret_cast<const V*>(weights[p] + c); });
      transform_square<GradientTransform, V>([&](int p, V& value) __attribute__((always_inline)) { value = pixels[p]; },
                                             [&](int f, const V& value) __attribute__((always_inline)) {
                                               *reinterpret_cast<V*>(weighted + f * frequency_stride + c) = value;
                                             });
    });
  }
};

// filters and y are [k, n, C, 3, 3]; the vectors of all neurons follow each other as the weights do.
void multiply(const Images<const float>& x, const Images<const float>& w, const at::Tensor& filters,
              const std::array<int64_t, 2>& padding, const at::Tensor& y) {
  const int64_t neurons = filters.size(1), outputs = filters.size(0) * neurons, inputs = x.channels;
  const at::Tensor flat = filters.flatten(0, 1), flat_y = y.flatten(0, 1);
  const at::Tensor transformed = transformed_kernels(kernels_like(flat, flat.const_data_ptr<float>()));
  const float* const matrices = transformed.const_data_ptr<float>();
  const Tiling tiling(w.batch, w.height, w.width);
  const std::vector<float> zeros(neurons, 0.f);

  const auto weighted_products = [&](int64_t first, int64_t last, FrequencyRows<const float> patches,
                                     FrequencyRows<float> gradient) {
    const int64_t stride = gradient.frequency_stride, tiles = (last - first) * tiling.columns;
    const int64_t threads = at::get_num_threads();
    const at::Tensor buffer = workspace<Products>(frequencies * stride);
    float* const products = buffer.mutable_data_ptr<float>();
    at::parallel_for(0, frequencies, at::divup(frequencies, threads), [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f) {
        multiply_tile(tiles, outputs, inputs, patches.data + f * patches.frequency_stride, inputs,
                      matrices + f * inputs * outputs, outputs, products + f * stride, outputs, false);
      }
    });
    at::parallel_for(first, last, at::divup(last - first, threads), [&](int64_t begin, int64_t end) {
      const int64_t offset = (begin - first) * tiling.columns;
      tiling.for_each(begin, end, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
        const float* weights[tile_outputs * tile_outputs];
        square_of_pixels<tile_outputs>(w, image, row, column, zeros.data(), weights);
        for (int64_t lot = 0; lot < outputs; lot += neurons) {
          const int64_t position = (offset + tile) * outputs + lot;
          widest<WeightTile>(products + position, weights, gradient.data + position, stride, neurons);
        }
      });
    });
  };
  winograd_kernel_gradient(x, tiling, padding[0], padding[1], weighted_products,
                           kernels_like(flat_y, flat_y.mutable_data_ptr<float>()));
}

}  // namespace

const char* winograd_obstacle(const at::Tensor& x, const at::Tensor& w, const at::Tensor& filters,
                              const Sliding& sliding) {
  constexpr std::array<int64_t, 2> ones = {1, 1};
  if (x.scalar_type() != at::kFloat) {
    return "it is for float32";
  }
  if (w.numel() == 0 || filters.numel() == 0) {
    return "there are no images or no filters";
  }
  if (filters.size(3) != 3 || filters.size(4) != 3 || sliding.stride != ones || sliding.dilation != ones) {
    return "it is for 3 x 3 kernels with stride and dilation 1";
  }
  return convolution::winograd_obstacle(
      {x.size(1), filters.size(0) * filters.size(1), w.size(0), w.size(2), w.size(3)});
}

at::Tensor winograd_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& filters,
                        const std::array<int64_t, 2>& padding) {
  note(Ran::Winograd);
  const int64_t neurons = filters.size(0), k = filters.size(1), batch = x.size(0);
  const int64_t most_neurons = std::max<int64_t>(8, most_matrix_floats / (frequencies * k * x.size(1)));
  const bool in_place = has_adjacent_channels(x) && has_adjacent_channels(w);
  const int64_t image_bytes = (x[0].numel() + w[0].numel()) * x.element_size();
  const int64_t most_images = in_place ? batch : std::max<int64_t>(1, most_copied_bytes / image_bytes);

  at::Tensor y = at::empty_like(filters, at::MemoryFormat::Contiguous);
  for (int64_t image = 0; image < batch; image += most_images) {
    const int64_t count = std::min(most_images, batch - image);
    const at::Tensor inputs = with_adjacent_channels(x.narrow(0, image, count));
    for (int64_t neuron = 0; neuron < neurons; neuron += most_neurons) {
      const int64_t some = std::min(most_neurons, neurons - neuron);
      const at::Tensor weights = with_adjacent_channels(w.narrow(0, image, count).narrow(1, neuron, some));
      const at::Tensor by_lot = filters.narrow(0, neuron, some).transpose(0, 1).contiguous();
      const at::Tensor sums = at::empty_like(by_lot), target = y.narrow(0, neuron, some);
      multiply(images(inputs), images(weights), by_lot, padding, sums);
      image == 0 ? target.copy_(sums.transpose(0, 1)) : target.add_(sums.transpose(0, 1));
    }
  }
  return y;
}

}  // namespace growkernels::splitting
