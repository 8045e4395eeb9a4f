#include "basis_conv/cpu_mix.h"

#include "common/gemm_tile.h"
#include "common/portable_tile.h"
#include "common/vector_width.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

namespace growkernels::basis_conv {
namespace {

constexpr int64_t block_pixels = 128;  // a block's gradient, maps and products stay in the second-level cache

// Sums over pixels are cut into parts of their own: the parts run in parallel, and the rounding error
// grows with the length of a part. Their number depends on the shapes alone, so the bits do as well.
constexpr int64_t part_pixels = 1024;
constexpr int64_t parts_floats = int64_t{1} << 22;

struct AddParts {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* parts, int64_t count, int64_t stride, float* sum) {
    for (int64_t i = 0; i < stride; ++i) {
      float total = parts[i];
      for (int64_t part = 1; part < count; ++part) {
        total += parts[part * stride + i];
      }
      sum[i] = total;
    }
  }
};

struct SubtractRow {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* x, int64_t x_stride, const float* row, int64_t rows,
                                                int64_t columns, float* out) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        out[i * columns + j] = x[i * x_stride + j] - row[j];
      }
    }
  }
};

}  // namespace

void mix_pixels(int64_t pixels, const float* z, int64_t z_stride, int64_t maps, const float* coeff_transposed,
                int64_t mixed_channels, float* mixed, int64_t mixed_stride) {
  if (mixed_channels == 0) {
    return;
  }
  for (int64_t p = 0; p < pixels; p += block_pixels) {
    multiply_tile(std::min(block_pixels, pixels - p), mixed_channels, maps, z + p * z_stride, z_stride,
                  coeff_transposed, mixed_channels, mixed + p * mixed_stride, mixed_stride, false);
  }
}

void mix_backward(const MixBackward& call) {
  const int64_t maps = call.maps, mixed = call.mixed_channels, matrix = maps * mixed;
  const int64_t most = std::max<int64_t>(1, parts_floats / std::max<int64_t>(matrix, 1));
  const int64_t parts = std::clamp<int64_t>(at::divup(call.pixels, part_pixels), 1, most);
  const int64_t length = at::divup(at::divup(call.pixels, parts), block_pixels) * block_pixels;
  const at::Tensor sums = at::empty({call.dcoeff != nullptr ? parts * matrix : 0}, at::kFloat);
  float* const sum = sums.mutable_data_ptr<float>();
  at::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t last_part) {
    std::vector<float> unbiased(call.z_bias != nullptr ? block_pixels * maps : 0);
    for (int64_t part = first_part; part < last_part; ++part) {
      float* const part_sum = sum + part * matrix;
      const int64_t begin = std::min(part * length, call.pixels), end = std::min(begin + length, call.pixels);
      if (begin == end && call.dcoeff != nullptr) {
        std::fill_n(part_sum, matrix, 0.f);
      }
      for (int64_t p = begin; p < end; p += block_pixels) {
        const int64_t count = std::min(block_pixels, end - p);
        const float* const grad = call.mixed + p * call.grad_stride;
        if (call.dz != nullptr) {
          float* const dz = call.dz + p * maps;
          if (call.top != nullptr) {
            for (int64_t i = 0; i < count; ++i) {
              std::copy_n(call.top + (p + i) * call.grad_stride, maps, dz + i * maps);
            }
          }
          if (mixed > 0) {
            multiply_tile(count, maps, mixed, grad, call.grad_stride, call.coeff, maps, dz, maps, call.top != nullptr);
          }
        }
        if (call.dcoeff != nullptr) {
          const float* z = call.z + p * call.z_stride;
          int64_t z_stride = call.z_stride;
          if (call.z_bias != nullptr) {
            widest<SubtractRow>(z, z_stride, call.z_bias, count, maps, unbiased.data());
            z = unbiased.data();
            z_stride = maps;
          }
          portable_transposed_tile(mixed, maps, count, grad, call.grad_stride, z, z_stride, part_sum, maps, p > begin);
        }
      }
    }
  });
  if (call.dcoeff != nullptr) {
    widest<AddParts>(static_cast<const float*>(sum), parts, matrix, call.dcoeff);
  }
}

}  // namespace growkernels::basis_conv
