#include "basis_conv/cpu_layout.h"

#include "basis_conv/cpu_images.h"
#include "common/huge_pages.h"
#include "common/transpose.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace growkernels::basis_conv {
namespace {

// out[j, i] = in[i, j] for the rows [first, last) of in, which is [rows, columns].
struct TransposeRows {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* in, int64_t rows, int64_t columns, int64_t first,
                                                int64_t last, float* out) {
    using V = Vector<float, bytes>;
    constexpr int64_t lanes = bytes / sizeof(float);
    int64_t i = first;
    for (; i + lanes <= last; i += lanes) {
      int64_t j = 0;
      for (; j + lanes <= columns; j += lanes) {
        V square[lanes];
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) {
          square[r] = *reinterpret_cast<const V*>(in + (i + r) * columns + j);
        }
        transpose_registers<float, bytes, lanes / 2, int32_t>(square);
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) {
          *reinterpret_cast<V*>(out + (j + r) * rows + i) = square[r];
        }
      }
      for (; j < columns; ++j) {
        for (int64_t r = 0; r < lanes; ++r) {
          out[j * rows + i + r] = in[(i + r) * columns + j];
        }
      }
    }
    for (; i < last; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        out[j * rows + i] = in[i * columns + j];
      }
    }
  }
};

// Every image is a matrix of [rows, columns].
void transpose_images(const at::Tensor& in, const at::Tensor& out, int64_t rows, int64_t columns) {
  const float* const source = in.const_data_ptr<float>();
  float* const target = out.mutable_data_ptr<float>();
  constexpr int64_t block = 64;
  const int64_t blocks = divide_up(rows, block);
  at::parallel_for(0, in.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks * rows * columns, first = task % blocks * block;
      widest<TransposeRows>(source + image, rows, columns, first, std::min(first + block, rows), target + image);
    }
  });
}

at::Tensor fresh(const at::Tensor& like, at::MemoryFormat format) {
  const at::Tensor tensor = at::empty(like.sizes(), like.options().memory_format(format));
  advise_huge_pages(tensor);
  return tensor;
}

}  // namespace

at::Tensor to_channels_last(const at::Tensor& images) {
  constexpr auto format = at::MemoryFormat::ChannelsLast;
  if (images.is_contiguous(format) || !images.is_contiguous()) {
    return images.contiguous(format);
  }
  const at::Tensor out = fresh(images, format);
  transpose_images(images, out, images.size(1), images.size(2) * images.size(3));
  return out;
}

at::Tensor to_contiguous(const at::Tensor& images) {
  if (images.is_contiguous() || !images.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    return images.contiguous();
  }
  const at::Tensor out = fresh(images, at::MemoryFormat::Contiguous);
  transpose_images(images, out, images.size(2) * images.size(3), images.size(1));
  return out;
}

}  // namespace growkernels::basis_conv
