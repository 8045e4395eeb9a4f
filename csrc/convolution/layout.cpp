#include "convolution/layout.h"

#include "common/huge_pages.h"
#include "common/pack.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace growkernels::convolution {
namespace {

// Every image is a matrix of [rows, columns]. A task is some columns of one image.
template <typename T>
void transpose_elements(const at::Tensor& in, const at::Tensor& out, int64_t rows, int64_t columns) {
  const T* const source = static_cast<const T*>(in.const_data_ptr());
  T* const target = static_cast<T*>(out.mutable_data_ptr());
  constexpr int64_t block = 64;
  const int64_t blocks = at::divup(columns, block);
  at::parallel_for(0, in.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks * rows * columns, first = task % blocks * block;
      using Source = Column<T, T>;
      widest<Transpose<Source>>(Source{source + image + first, columns}, rows, rows, std::min(block, columns - first),
                                target + image + first * rows);
    }
  });
}

void transpose_images(const at::Tensor& in, const at::Tensor& out, int64_t rows, int64_t columns) {
  in.element_size() == 2 ? transpose_elements<at::BFloat16>(in, out, rows, columns)
                         : transpose_elements<float>(in, out, rows, columns);
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

bool has_adjacent_channels(const at::Tensor& tensor) {
  const int64_t pixel = tensor.stride(3), row = tensor.size(3) * pixel;
  return tensor.stride(1) == 1 && pixel >= tensor.size(1) && tensor.stride(2) == row &&
         tensor.stride(0) == tensor.size(2) * row;
}

at::Tensor with_adjacent_channels(const at::Tensor& tensor) {
  return has_adjacent_channels(tensor) ? tensor : to_channels_last(tensor);
}

Images<const float> images(const at::Tensor& tensor) { return images_of<float>(tensor); }

}  // namespace growkernels::convolution
