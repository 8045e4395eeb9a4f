// The kernels' gradient: a sum over images and pixels. 32 of those are the depth of a product of tiles; where the
// images are 32, that is one pixel of them all, and a tap only chooses another pixel.

#include "convolution/direct_tiles.h"

#include "common/scratch.h"
#include "common/vector_width.h"
#include "common/workspace.h"
#include "convolution/tile_packing.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace growkernels::convolution {
namespace {

using c10::BFloat16;

constexpr int64_t packed_bytes = int64_t{1} << 19;  // of an item

struct Gradient {
  Images<const BFloat16> in, out;
  AxisMap y, x;
  int64_t kernel_width, taps;
  PackedAxis columns;
  int64_t images, rows;  // of an item; an even number of images, of which the last may not exist

  Gradient(const Images<const BFloat16>& in, const Images<const BFloat16>& out, const Sliding& y_sliding,
           const Sliding& x_sliding)
      : in(in),
        out(out),
        y(forward_map(y_sliding, in.height, out.height)),
        x(forward_map(x_sliding, in.width, out.width)),
        kernel_width(x_sliding.kernel),
        taps(y_sliding.kernel * x_sliding.kernel),
        columns(x) {
    images = in.batch >= packed_depth ? packed_depth : (in.batch + 1) / 2 * 2;
    const int64_t row_bytes =
        2 * images * (columns.count * y.step * in_tiles() * packed_columns + out.width * out_tiles() * packed_rows);
    rows = std::clamp<int64_t>(packed_bytes / std::max<int64_t>(row_bytes, 1), 1, out.height);
    rows = at::divup(out.height, at::divup(out.height, rows));
  }

  int64_t in_tiles() const { return at::divup(in.channels, packed_columns); }
  int64_t out_tiles() const { return at::divup(out.channels, packed_rows); }
  int64_t in_blocks() const { return at::divup(in_tiles(), 2); }
  int64_t out_blocks() const { return at::divup(out_tiles(), 2); }
  int64_t bands() const { return at::divup(out.height, rows); }
  int64_t items() const { return at::divup(in.batch, images) * bands(); }
  int64_t depth() const { return at::divup(out.width * images, packed_depth); }  // of a row
  // Sums of one worker: [block of outputs][block of inputs][tap][32][32].
  int64_t sums() const { return out_blocks() * in_blocks() * taps * block_pixels * block_columns; }
};

class Worker {
 public:
  Worker(const Gradient& g, float* sums) : g_(g), sums_(sums), zeros_(std::max(g.in.channels, g.out.channels)) {
    std::fill_n(sums, g.sums(), 0.f);
  }

  void run(int64_t item) {
    first_image_ = item / g_.bands() * g_.images;
    first_row_ = item % g_.bands() * g_.rows;
    end_row_ = std::min(first_row_ + g_.rows, g_.out.height);
    if (first_row_ >= end_row_) {
      return;
    }
    pack_gradient();
    pack_inputs();
    for (int64_t o = 0; o < g_.out_blocks(); ++o) {
      for (int64_t i = 0; i < g_.in_blocks(); ++i) {
        for (const AxisMap::Tap& y : g_.y.taps[0]) {
          for (const AxisMap::Tap& x : g_.x.taps[0]) {
            multiply(o, i, y, x);
          }
        }
      }
    }
  }

 private:
  // The images' rows of channels in a pixel, zeros for images that do not exist.
  const BFloat16* pixel(const Images<const BFloat16>& images, int64_t image, int64_t y, int64_t x) const {
    return first_image_ + image < images.batch ? images.pixel(first_image_ + image, y, x) : zeros_.data();
  }

  void pack_gradient() {
    const int64_t rows = end_row_ - first_row_, pixels = g_.out.width * g_.images;
    out_plane_ = rows * g_.depth() * packed_tile;
    out_ = out_memory_.at_least(out_plane_ * g_.out_tiles());
    const BFloat16* sources[packed_depth];
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t block = 0; block < g_.depth(); ++block) {
        for (int64_t p = 0; p < packed_depth; ++p) {
          const int64_t place = block * packed_depth + p;
          sources[p] =
              place < pixels ? pixel(g_.out, place % g_.images, first_row_ + row, place / g_.images) : zeros_.data();
        }
        widest<PackTransposed>(static_cast<const BFloat16* const*>(sources), g_.out.channels, out_plane_,
                               out_ + (row * g_.depth() + block) * packed_tile);
      }
    }
  }

  void pack_inputs() {
    first_input_ = g_.in.height;
    int64_t end = 0;
    for (int64_t row = first_row_; row < end_row_; ++row) {
      for (const AxisMap::Tap& tap : g_.y.taps[0]) {
        if (g_.y.sees(tap, row)) {
          first_input_ = std::min(first_input_, row * g_.y.step + tap.start);
          end = std::max(end, row * g_.y.step + tap.start + 1);
        }
      }
    }
    const int64_t pairs = g_.images / 2;
    row_pairs_ = g_.columns.count * pairs;
    in_plane_ = (std::max<int64_t>(end - first_input_, 0) * row_pairs_ + packed_depth / 2) * pair_size;
    in_ = in_memory_.at_least(in_plane_ * g_.in_tiles());
    const BFloat16* sources[packed_depth];
    for (int64_t row = first_input_; row < end; ++row) {
      for (int64_t place = 0; place < g_.columns.count; ++place) {
        const int64_t column = g_.columns.input(place);
        const bool inside = column >= 0 && column < g_.in.width;
        for (int64_t image = 0; image < g_.images; ++image) {
          sources[image] = inside ? pixel(g_.in, image, row, column) : zeros_.data();
        }
        widest<PackPairs>(static_cast<const BFloat16* const*>(sources), g_.images, g_.in.channels, in_plane_,
                          in_ + ((row - first_input_) * row_pairs_ + place * pairs) * pair_size);
      }
    }
  }

  void multiply(int64_t o, int64_t i, const AxisMap::Tap& y, const AxisMap::Tap& x) {
    // One pixel is one product where there are 32 images: those of which the tap sees nothing are left out.
    int64_t first = 0, last = g_.out.width * g_.images / packed_depth;
    const bool rest = g_.out.width * g_.images % packed_depth != 0;
    if (g_.images == packed_depth) {
      while (first < last && !g_.x.sees(x, first)) {
        ++first;
      }
      while (first < last && !g_.x.sees(x, last - 1)) {
        --last;
      }
    }
    a_offsets_.clear();
    b_offsets_.clear();
    const int64_t column = g_.columns.place(x.start) * g_.images / 2 * pair_size;
    for (int64_t row = first_row_; row < end_row_; ++row) {
      if (g_.y.sees(y, row)) {
        a_offsets_.push_back(((row - first_row_) * g_.depth() + first) * packed_tile);
        const int64_t input_row = row * g_.y.step + y.start - first_input_;
        b_offsets_.push_back(input_row * row_pairs_ * pair_size + column + first * packed_tile);
      }
    }
    const int64_t out_tiles = std::min<int64_t>(2, g_.out_tiles() - 2 * o);
    const int64_t in_tiles = std::min<int64_t>(2, g_.in_tiles() - 2 * i);
    float* const sums = sums_ + ((o * g_.in_blocks() + i) * g_.taps + y.index * g_.kernel_width + x.index) *
                                    block_pixels * block_columns;
    TileSum sum{static_cast<int64_t>(a_offsets_.size()),
                last - first,
                out_ + 2 * o * out_plane_,
                a_offsets_.data(),
                packed_tile,
                out_plane_,
                in_ + 2 * i * in_plane_,
                b_offsets_.data(),
                packed_tile,
                in_plane_,
                sums,
                block_columns,
                true};
    if (last > first) {
      tiles_.add(out_tiles, in_tiles, sum);
    }
    if (rest) {
      add_rest(sum, out_tiles, in_tiles, last);
    }
  }

  // The products of the last pixels of every row, fewer than 32. What lies behind them is not theirs, and no zero
  // makes a NaN vanish, so they are copied.
  void add_rest(TileSum sum, int64_t out_tiles, int64_t in_tiles, int64_t block) {
    alignas(64) BFloat16 copy[2 * packed_tile];
    const int64_t pairs = (g_.out.width * g_.images - block * packed_depth) / 2;
    std::fill_n(copy, 2 * packed_tile, BFloat16(0));
    const BFloat16* const inputs = sum.b;
    const int64_t zero = 0;
    sum.b = copy;
    sum.b_offsets = &zero;
    sum.b_next = packed_tile;
    sum.count = sum.depth = 1;
    for (size_t row = 0; row < a_offsets_.size(); ++row) {
      for (int64_t tile = 0; tile < in_tiles; ++tile) {
        const BFloat16* const source = inputs + tile * in_plane_ + b_offsets_[row] + block * packed_tile;
        std::copy_n(source, pairs * pair_size, copy + tile * packed_tile);
      }
      const int64_t a_offset = a_offsets_[row] + block * packed_tile;
      sum.a_offsets = &a_offset;
      tiles_.add(out_tiles, in_tiles, sum);
    }
  }

  static constexpr int64_t pair_size = 2 * packed_columns;  // elements of a pair of rows of a tile of B

  const Gradient& g_;
  float* const sums_;
  const std::vector<BFloat16> zeros_;
  const TileSums tiles_;
  int64_t first_image_ = 0, first_row_ = 0, end_row_ = 0, first_input_ = 0;
  int64_t out_plane_ = 0, in_plane_ = 0, row_pairs_ = 0;
  Scratch<BFloat16> out_memory_, in_memory_;
  BFloat16 *out_ = nullptr, *in_ = nullptr;
  std::vector<int64_t> a_offsets_, b_offsets_;
};

struct KernelSums;  // owner of a workspace

}  // namespace

void direct_tiles_kernel_gradient(const Images<const BFloat16>& in, const Images<const BFloat16>& gradient,
                                  const Sliding& y, const Sliding& x, const Kernels<BFloat16>& kernel_gradient) {
  const Gradient g(in, gradient, y, x);
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(g.items(), at::get_num_threads()));
  const int64_t size = g.sums();
  const at::Tensor memory = workspace<KernelSums>(workers * size);
  float* const sums = memory.mutable_data_ptr<float>();
  const int64_t share = at::divup(g.items(), workers);
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      Worker worker(g, sums + index * size);
      for (int64_t item = index * share; item < std::min((index + 1) * share, g.items()); ++item) {
        worker.run(item);
      }
    }
  });
  const int64_t tile = block_pixels * block_columns;
  at::parallel_for(0, size / tile, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* const total = sums + t * tile;
      for (int64_t worker = 1; worker < workers; ++worker) {
        for (int64_t e = 0; e < tile; ++e) {
          total[e] += total[worker * size + e];
        }
      }
      const int64_t tap = t % g.taps, i = t / g.taps % g.in_blocks(), o = t / g.taps / g.in_blocks();
      BFloat16* const target = kernel_gradient.data + tap / x.kernel * kernel_gradient.row_stride +
                               tap % x.kernel * kernel_gradient.tap_stride;
      for (int64_t r = 0; r < std::min(block_pixels, gradient.channels - o * block_pixels); ++r) {
        for (int64_t c = 0; c < std::min(block_columns, in.channels - i * block_columns); ++c) {
          target[(o * block_pixels + r) * kernel_gradient.out_stride +
                 (i * block_columns + c) * kernel_gradient.in_stride] = BFloat16(total[r * block_columns + c]);
        }
      }
    }
  });
}

}  // namespace growkernels::convolution
