#pragma once
// Loading: blocks of rows of x and of weights w, wherever they lie, become row-major tiles. Tensors that
// have the layout already are used as they are; a filter's patches are gathered here and nowhere else.

#include "common/pack.h"
#include "common/scratch.h"
#include "splitting/cpu_plan.h"

#include <algorithm>
#include <cstdint>

namespace growkernels::splitting {

template <typename In, typename Out>
struct CopyRows {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const In* x, int64_t stride, int64_t rows, int64_t columns, Out* out,
                                                int64_t out_stride) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t j = 0; j < columns; ++j) {
        out[m * out_stride + j] = cast<Out>(x[m * stride + j]);
      }
      for (int64_t j = columns; j < out_stride; ++j) {
        out[m * out_stride + j] = Out(0);
      }
    }
  }
};

// out[r, c] = source[r * row_stride + c * column_stride]; zeros from `columns` to the end of out's rows.
template <typename In, typename Out>
void load_block(const In* source, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, Out* out,
                int64_t out_stride) {
  if (column_stride == 1 || columns == 1) {
    widest<CopyRows<In, Out>>(source, row_stride, rows, columns, out, out_stride);
  } else if (row_stride == 1) {
    using Source = Column<In, Out>;
    widest<Transpose<Source>>(Source{source, column_stride}, columns, out_stride, rows, out);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        out[r * out_stride + c] =
            Column<In, Out>::out(cast<accumulate_t<In>>(source[r * row_stride + c * column_stride]));
      }
      std::fill(out + r * out_stride + columns, out + (r + 1) * out_stride, Out(0));
    }
  }
}

// One worker's access to the rows of a problem. In: dtype of the tensors; Operand: that of the tiles.
template <typename In, typename Operand>
class Loader {
 public:
  explicit Loader(const Problem& problem)
      : problem_(problem),
        x_(problem.x.const_data_ptr<In>()),
        w_(problem.w.const_data_ptr<In>()),
        channels_(problem.x.size(1)),
        pixels_(problem.pixels()) {}

  // Rows [begin, begin + count) of x, each with zeros behind it up to a length of `padded`.
  Rows<Operand> rows(int64_t begin, int64_t count, int64_t padded) {
    const at::Tensor& x = problem_.x;
    const bool in_place = problem_.one_tap() && x.stride(1) == 1 && padded == problem_.width();
    if constexpr (std::is_same_v<In, Operand>) {
      if (in_place && begin / pixels_ == (begin + count - 1) / pixels_) {
        return {x_ + begin / pixels_ * x.stride(0) + begin % pixels_ * x.stride(3), x.stride(3)};
      }
    }
    Operand* block = block_.at_least(count * padded);
    for (int64_t done = 0; done < count;) {  // image by image
      const int64_t image = (begin + done) / pixels_, pixel = (begin + done) % pixels_;
      const int64_t piece = std::min(count - done, pixels_ - pixel);
      if (problem_.one_tap()) {
        load_block(x_ + image * x.stride(0) + pixel * x.stride(3), x.stride(3), x.stride(1), piece, channels_,
                   block + done * padded, padded);
      } else {
        patches(image, pixel, piece, block + done * padded, padded);
      }
      done += piece;
    }
    return {block, padded};
  }

  // The weights of `neurons` neurons from `first` in those rows.
  Rows<In> weights(int64_t begin, int64_t count, int64_t first, int64_t neurons) {
    const at::Tensor& w = problem_.w;
    const int64_t pixel_stride = w.stride(2), neuron_stride = w.stride(1);
    const auto at = [&](int64_t row) {
      return w_ + row / pixels_ * w.stride(0) + row % pixels_ * pixel_stride + first * neuron_stride;
    };
    if (neuron_stride == 1 && begin / pixels_ == (begin + count - 1) / pixels_) {
      return {at(begin), pixel_stride};
    }
    In* block = weights_.at_least(count * neurons);
    for (int64_t done = 0; done < count;) {
      const int64_t piece = std::min(count - done, pixels_ - (begin + done) % pixels_);
      load_block(at(begin + done), pixel_stride, neuron_stride, piece, neurons, block + done * neurons, neurons);
      done += piece;
    }
    return {block, neurons};
  }

 private:
  struct Image {
    const Operand* data;
    int64_t row_stride, pixel_stride;
  };

  // An image with its channels innermost: in place, or converted once for all of its patches.
  Image image_of(int64_t image) {
    const at::Tensor& x = problem_.x;
    const In* source = x_ + image * x.stride(0);
    if constexpr (std::is_same_v<In, Operand>) {
      if (x.stride(1) == 1) {
        return {source, x.stride(2), x.stride(3)};
      }
    }
    const int64_t height = x.size(2), width = x.size(3);
    Operand* target = image_.at_least(height * width * channels_);
    if (image != held_) {
      for (int64_t y = 0; y < height; ++y) {
        load_block(source + y * x.stride(2), x.stride(3), x.stride(1), width, channels_, target + y * width * channels_,
                   channels_);
      }
      held_ = image;
    }
    return {target, width * channels_, channels_};
  }

  // The patches at `count` positions of one image; taps beyond its border are zeros.
  void patches(int64_t image, int64_t first, int64_t count, Operand* out, int64_t out_stride) {
    const Image source = image_of(image);
    const auto [stride, padding, dilation] = problem_.sliding;
    const int64_t height = problem_.x.size(2), width = problem_.x.size(3), out_width = problem_.out_width;
    for (int64_t p = first; p < first + count; ++p, out += out_stride) {
      const int64_t top = p / out_width * stride[0] - padding[0], left = p % out_width * stride[1] - padding[1];
      Operand* target = out;
      for (int64_t ky = 0; ky < problem_.kernel_height; ++ky) {
        const int64_t y = top + ky * dilation[0];
        for (int64_t kx = 0; kx < problem_.kernel_width; ++kx, target += channels_) {
          const int64_t column = left + kx * dilation[1];
          if (y >= 0 && y < height && column >= 0 && column < width) {
            std::copy_n(source.data + y * source.row_stride + column * source.pixel_stride, channels_, target);
          } else {
            std::fill_n(target, channels_, Operand(0));
          }
        }
      }
      std::fill(target, out + out_stride, Operand(0));
    }
  }

  const Problem& problem_;
  const In* x_;
  const In* w_;
  const int64_t channels_, pixels_;
  int64_t held_ = -1;
  Scratch<Operand> block_, image_;
  Scratch<In> weights_;
};

}  // namespace growkernels::splitting
