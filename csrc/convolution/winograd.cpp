#include "convolution/winograd.h"

#include "common/gemm_tile.h"
#include "common/portable_tile.h"
#include "common/workspace.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace growkernels::convolution {
namespace {

// Frequencies are stored this many floats further apart than they need: at a power of two, all 36 of a
// channel would compete for the same few lines of the first-level cache.
constexpr int64_t skew = 16;

constexpr int64_t part_tiles = 512;                 // at least, unless the sums exceed
constexpr int64_t parts_floats = int64_t{1} << 22;  // 16 MiB

// Matrices [inputs, outputs] of all frequencies that exceed the second-level cache pay for more tiles a
// group: each group reads them once.
constexpr int64_t large_matrices = int64_t{1} << 20;

// Input channels are summed in runs of this many, and the runs' sums added: the rounding error of a sum
// grows with its length, and a run's part of a matrix stays in the first-level cache.
constexpr int64_t run_channels = 128;

// Owners of the threads' workspaces.
struct KernelMatrices;
struct KernelSums;
struct Group;

// G g G^T of the kernels from some input channels, as 36 matrices [inputs, outputs].
struct TransformKernels {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const Kernels<const float>* kernels, int64_t first, int64_t last,
                                                float* out) {
    const int64_t matrix = kernels->inputs * kernels->outputs;
    for_channel_vectors<bytes>(kernels->outputs, [&](int64_t c, auto zero) __attribute__((always_inline)) {
      using V = decltype(zero);
      constexpr int lanes = sizeof(V) / sizeof(float);
      for (int64_t in = first; in < last; ++in) {
        const float* source = kernels->data + c * kernels->out_stride + in * kernels->in_stride;
        transform_square<KernelTransform, V>(
            [&](int tap, V& value) __attribute__((always_inline)) {
              const float* element = source + tap / 3 * kernels->row_stride + tap % 3 * kernels->tap_stride;
              float values[lanes];
              for (int lane = 0; lane < lanes; ++lane) {
                values[lane] = element[lane * kernels->out_stride];
              }
              value = *reinterpret_cast<const V*>(values);
            },
            [&](int f, const V& value) __attribute__((always_inline)) {
              *reinterpret_cast<V*>(out + f * matrix + in * kernels->outputs + c) = value;
            });
      }
    });
  }
};

// G^T v G for some output channels, v the sum of `parts` lots of 36 matrices [outputs, inputs].
struct TransformKernelGradients {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* v, int64_t parts, int64_t part_stride,
                                                const Kernels<float>* gradient, int64_t first, int64_t last) {
    const int64_t matrix = gradient->outputs * gradient->inputs;
    for (int64_t out = first; out < last; ++out) {
      for_channel_vectors<bytes>(gradient->inputs, [&](int64_t c, auto zero) __attribute__((always_inline)) {
        using V = decltype(zero);
        constexpr int lanes = sizeof(V) / sizeof(float);
        const float* source = v + out * gradient->inputs + c;
        float* target = gradient->data + out * gradient->out_stride + c * gradient->in_stride;
        transform_square<KernelGradientTransform, V>(
            [&](int f, V& value) __attribute__((always_inline)) {
              value = *reinterpret_cast<const V*>(source + f * matrix);
              for (int64_t part = 1; part < parts; ++part) {
                value += *reinterpret_cast<const V*>(source + part * part_stride + f * matrix);
              }
            },
            [&](int tap, const V& value) __attribute__((always_inline)) {
              float* element = target + tap / 3 * gradient->row_stride + tap % 3 * gradient->tap_stride;
              for (int lane = 0; lane < lanes; ++lane) {
                element[lane * gradient->in_stride] = value[lane];
              }
            });
      });
    }
  }
};

}  // namespace

at::Tensor transformed_kernels(const Kernels<const float>& kernels) {
  at::Tensor matrices = workspace<KernelMatrices>(frequencies * kernels.inputs * kernels.outputs);
  float* const out = matrices.mutable_data_ptr<float>();
  at::parallel_for(0, kernels.inputs, at::divup(kernels.inputs, at::get_num_threads()),
                   [&](int64_t first, int64_t last) { widest<TransformKernels>(&kernels, first, last, out); });
  return matrices;
}

void winograd_convolution(const Images<const float>& in, const Kernels<const float>& kernels, int64_t pad_y,
                          int64_t pad_x, const Images<float>& out,
                          const std::function<void(int64_t, int64_t)>& finish) {
  const int64_t inputs = in.channels, outputs = out.channels, threads = at::get_num_threads();
  const at::Tensor transformed = transformed_kernels(kernels);
  const float* const matrices = transformed.const_data_ptr<float>();
  const Tiling tiling(out.batch, out.height, out.width);
  const int64_t group_tiles = frequencies * inputs * outputs < large_matrices ? 32 : 64;
  const int64_t group = std::clamp<int64_t>(group_tiles / tiling.columns, 1, at::divup(tiling.strips, threads));
  const int64_t capacity = group * tiling.columns;
  const int64_t in_stride = capacity * inputs + skew, out_stride = capacity * outputs + skew;
  const std::vector<float> zeros(inputs, 0.f);
  at::parallel_for(0, at::divup(tiling.strips, group), 1, [&](int64_t first_group, int64_t last_group) {
    const at::Tensor buffer = workspace<Group>(frequencies * (in_stride + out_stride));
    float* const patches = buffer.mutable_data_ptr<float>();
    float* const products = patches + frequencies * in_stride;
    for (int64_t g = first_group; g < last_group; ++g) {
      const int64_t first = g * group, last = std::min(first + group, tiling.strips);
      const int64_t tiles = (last - first) * tiling.columns;
      tiling.for_each(first, last, [&](int64_t tile, int64_t image, int64_t y, int64_t x) {
        const float* pixels[tile_inputs * tile_inputs];
        square_of_pixels<tile_inputs>(in, image, y - pad_y, x - pad_x, zeros.data(), pixels);
        widest<PixelsToFrequencies<InputTransform>>(pixels, patches + tile * inputs, in_stride, inputs);
      });
      for (int64_t f = 0; f < frequencies; ++f) {
        for (int64_t channel = 0; channel < inputs; channel += run_channels) {
          multiply_tile(tiles, outputs, std::min(run_channels, inputs - channel), patches + f * in_stride + channel,
                        inputs, matrices + (f * inputs + channel) * outputs, outputs, products + f * out_stride,
                        outputs, channel > 0);
        }
      }
      tiling.for_each(first, last, [&](int64_t tile, int64_t image, int64_t y, int64_t x) {
        float* pixels[tile_outputs * tile_outputs];
        square_of_pixels<tile_outputs, float>(out, image, y, x, nullptr, pixels);
        widest<FrequenciesToPixels>(products + tile * outputs, out_stride, pixels, outputs);
      });
      const auto first_pixel = [&](int64_t strip) {
        return (strip / tiling.rows * out.height + strip % tiling.rows * tile_outputs) * out.width;
      };
      const int64_t begin = first_pixel(first), end = last == tiling.strips ? out.pixels() : first_pixel(last);
      finish(begin, end - begin);
    }
  });
}

void winograd_kernel_gradient(const Images<const float>& in, const Tiling& tiling, int64_t pad_y, int64_t pad_x,
                              const GradientOfStrips& output_gradient, const Kernels<float>& kernel_gradient) {
  const int64_t inputs = in.channels, outputs = kernel_gradient.outputs, threads = at::get_num_threads();
  const int64_t matrix = inputs * outputs, all = frequencies * matrix;
  const bool large = all >= large_matrices;
  const int64_t group = std::clamp<int64_t>((large ? 128 : 32) / tiling.columns, 1, tiling.strips);
  const int64_t capacity = group * tiling.columns;
  const int64_t in_stride = capacity * inputs + skew, out_stride = capacity * outputs + skew;

  // The tiles are cut into parts with sums of their own: they run in parallel, and the rounding error grows
  // with the length of a part. Their number depends on the shapes alone, so the bits do as well.
  const int64_t most = std::max<int64_t>(1, parts_floats / all);
  const int64_t parts =
      std::clamp<int64_t>(at::divup(tiling.strips * tiling.columns, part_tiles), 1, std::min(most, tiling.strips));
  const at::Tensor sums = workspace<KernelSums>(parts * all);
  float* const sum = sums.mutable_data_ptr<float>();
  const auto part_begin = [&](int64_t part) { return tiling.strips * part / parts; };

  const std::vector<float> zeros(inputs, 0.f);
  // Threads that have a part each run the loops inside alone: nested parallel_for is serial.
  const auto sum_part = [&](int64_t part) {
    const at::Tensor buffer = workspace<Group>(frequencies * (in_stride + out_stride));
    float* const patches = buffer.mutable_data_ptr<float>();
    float* const gradient = patches + frequencies * in_stride;
    for (int64_t first = part_begin(part); first < part_begin(part + 1); first += group) {
      const int64_t last = std::min(first + group, part_begin(part + 1));
      at::parallel_for(first, last, at::divup(last - first, threads), [&](int64_t begin, int64_t end) {
        float* const rows = patches + (begin - first) * tiling.columns * inputs;
        tiling.for_each(begin, end, [&](int64_t tile, int64_t image, int64_t y, int64_t x) {
          const float* pixels[tile_inputs * tile_inputs];
          square_of_pixels<tile_inputs>(in, image, y - pad_y, x - pad_x, zeros.data(), pixels);
          widest<PixelsToFrequencies<InputTransform>>(pixels, rows + tile * inputs, in_stride, inputs);
        });
      });
      output_gradient(first, last, {patches, in_stride}, {gradient, out_stride});
      at::parallel_for(0, frequencies, at::divup(frequencies, threads), [&](int64_t begin, int64_t end) {
        for (int64_t f = begin; f < end; ++f) {
          portable_transposed_tile(outputs, inputs, (last - first) * tiling.columns, gradient + f * out_stride, outputs,
                                   patches + f * in_stride, inputs, sum + part * all + f * matrix, inputs,
                                   first > part_begin(part));
        }
      });
    }
  };
  if (large) {  // the threads share each group: tiles while transforming, frequencies while multiplying
    for (int64_t part = 0; part < parts; ++part) {
      sum_part(part);
    }
  } else {
    at::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t last_part) {
      for (int64_t part = first_part; part < last_part; ++part) {
        sum_part(part);
      }
    });
  }
  at::parallel_for(0, outputs, at::divup(outputs, threads), [&](int64_t first, int64_t last) {
    widest<TransformKernelGradients>(static_cast<const float*>(sum), parts, all, &kernel_gradient, first, last);
  });
}

void winograd_kernel_gradient(const Images<const float>& in, const Images<const float>& output_gradient, int64_t pad_y,
                              int64_t pad_x, const Kernels<float>& kernel_gradient) {
  const Tiling tiling(output_gradient.batch, output_gradient.height, output_gradient.width);
  const int64_t channels = output_gradient.channels;
  const std::vector<float> zeros(channels, 0.f);
  const auto transform = [&](int64_t image, int64_t y, int64_t x, float* target, int64_t frequency_stride) {
    const float* pixels[tile_outputs * tile_outputs];
    square_of_pixels<tile_outputs>(output_gradient, image, y, x, zeros.data(), pixels);
    widest<PixelsToFrequencies<GradientTransform>>(pixels, target, frequency_stride, channels);
  };
  winograd_kernel_gradient(in, tiling, pad_y, pad_x, tile_by_tile(tiling, channels, transform), kernel_gradient);
}

}  // namespace growkernels::convolution
