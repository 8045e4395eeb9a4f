#include "convolution/direct_tiles.h"

#include "common/scratch.h"
#include "common/vector_width.h"
#include "convolution/tile_packing.h"

#include <ATen/Parallel.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <vector>

namespace growkernels::convolution {
namespace {

using c10::BFloat16;

// How a convolution is cut into items of work: some images, some rows of their outputs.
struct Plan {
  int64_t images, rows;
  bool flat;  // rows follow each other as one long row, with the columns between them
};

int64_t blocks_of(int64_t pixels) { return at::divup(pixels, block_pixels); }

// Taps of a row's pixels that cost something, all pixels together.
int64_t taps_of_row(const AxisMap& x, int64_t images) {
  int64_t taps = 0;
  for (const auto phase : c10::irange(x.classes)) {
    const int64_t pixels = x.count(phase) * images;
    for (const AxisMap::Tap& tap : x.taps[phase]) {
      for (int64_t first = 0; first < pixels; first += block_pixels) {
        const int64_t last = std::min(first + block_pixels, pixels) - 1;
        taps += x.any_sees(tap, first / images, last / images) ? block_pixels : 0;
      }
    }
  }
  return taps;
}

struct Rows {
  int64_t first, end;  // of the input
};

// Those that the outputs [begin, end) see.
Rows rows_seen(const AxisMap& y, int64_t begin, int64_t end, bool beyond_the_image) {
  Rows rows{y.in, 0};
  bool any = false;
  for (int64_t o = begin; o < end; ++o) {
    for (const AxisMap::Tap& tap : y.taps[o % y.classes]) {
      const int64_t i = o / y.classes * y.step + tap.start;
      if (beyond_the_image || (i >= 0 && i < y.in)) {
        rows = any ? Rows{std::min(rows.first, i), std::max(rows.end, i + 1)} : Rows{i, i + 1};
        any = true;
      }
    }
  }
  return any ? rows : Rows{0, 0};
}

constexpr int64_t packed_bytes = int64_t{1} << 19;  // of an item, beside the kernels in the second-level cache

// Cycles on one core: 2 for a pixel's product with a tap of 32 x 32 channels, so many to pack 32 channels of one.
constexpr double product_cycles = 2, packing_cycles = 5;

Plan make_plan(const AxisMap& y, const AxisMap& x, const PackedAxis& columns, int64_t batch, int64_t chunks,
               int64_t column_blocks) {
  const bool may_be_flat =
      y.classes == 1 && x.classes == 1 && y.step == 1 && x.step == 1 && !x.taps[0].empty() && !y.taps[0].empty();
  Plan best{1, 1, false};
  double least = 0;
  const auto consider = [&](int64_t images, bool flat) {
    const int64_t row_bytes = columns.count * images * chunks * packed_depth * 2;
    int64_t rows = 1;
    const auto packed_rows_of = [&](int64_t r) {
      const Rows seen = rows_seen(y, 0, std::min(r, y.out), true);
      return seen.end - seen.first;
    };
    while (rows < y.out && packed_rows_of(2 * rows) * row_bytes <= packed_bytes) {
      rows *= 2;
    }
    rows = at::divup(y.out, at::divup(y.out, std::min(rows, y.out)));
    const int64_t packed = packed_rows_of(rows);
    double taps = 0;  // of the rows' pixels
    if (flat) {
      taps = static_cast<double>(blocks_of(((rows - 1) * columns.count + x.out) * images) * block_pixels *
                                 x.taps[0].size() * y.taps[0].size());
    } else {
      double tap_rows = 0;
      for (int64_t o = 0; o < y.out; ++o) {
        for (const AxisMap::Tap& tap : y.taps[o % y.classes]) {
          tap_rows += y.sees(tap, o / y.classes);
        }
      }
      taps = static_cast<double>(taps_of_row(x, images)) * tap_rows * static_cast<double>(rows) /
             static_cast<double>(y.out);
    }
    const double groups = static_cast<double>(at::divup(batch, images) * at::divup(y.out, rows));
    const double cost = groups * static_cast<double>(chunks) *
                        (product_cycles * taps * static_cast<double>(column_blocks) +
                         packing_cycles * static_cast<double>(packed * columns.count * images));
    if (least == 0 || cost < least) {
      least = cost;
      best = {images, rows, flat};
    }
  };
  for (int64_t images = 1; images <= std::min<int64_t>(batch, 32); images = images < 2 ? 2 : images * 2) {
    consider(images, false);
    if (may_be_flat) {
      consider(images, true);
    }
  }
  if (batch < 32) {
    consider(batch, false);
  }
  // Items for all threads.
  const int64_t groups = at::divup(batch, best.images), wanted = at::divup(int64_t{2} * at::get_num_threads(), groups);
  const int64_t bands = std::min(y.out, std::max(at::divup(y.out, best.rows), wanted));
  best.rows = at::divup(y.out, bands);
  return best;
}

struct Convolution {
  Images<const BFloat16> in;
  AxisMap y, x;
  int64_t kernel_width, outputs;
  const BFloat16* kernels;  // packed: [column block][tap][chunk][2 tiles]
  PackedAxis columns;
  Plan plan;

  Convolution(const Images<const BFloat16>& in, AxisMap y, AxisMap x, const Sliding& y_sliding,
              const Sliding& x_sliding, int64_t outputs, const BFloat16* kernels)
      : in(in),
        y(std::move(y)),
        x(std::move(x)),
        kernel_width(x_sliding.kernel),
        outputs(outputs),
        kernels(kernels),
        columns(this->x),
        plan(make_plan(this->y, this->x, columns, in.batch, chunks(), column_blocks())),
        taps_(y_sliding.kernel * x_sliding.kernel) {}

  int64_t chunks() const { return at::divup(in.channels, packed_depth); }
  int64_t column_blocks() const { return at::divup(outputs, block_columns); }
  int64_t bands() const { return at::divup(y.out, plan.rows); }
  int64_t items() const { return at::divup(in.batch, plan.images) * bands(); }
  int64_t tap_size() const { return chunks() * 2 * packed_tile; }
  int64_t column_block_size() const { return taps_ * tap_size(); }

 private:
  int64_t taps_;
};

// 32 pixels of the output, and the products that they are sums of.
struct Block {
  int64_t pixels[block_pixels];  // their numbers, -1 for none
  int64_t row_tiles;
  size_t first_tap, taps;
};

class Worker {
 public:
  Worker(const Convolution& c, std::unique_ptr<Sink> sink) : c_(c), sink_(std::move(sink)) {
    for (const auto& taps : c.x.taps) {
      for (const AxisMap::Tap& tap : taps) {
        columns_.push_back(c.columns.place(tap.start) * c.plan.images);
      }
      first_columns_.push_back(columns_.size());
    }
  }

  void run(int64_t item) {
    first_image_ = item / c_.bands() * c_.plan.images;
    images_ = std::min(c_.plan.images, c_.in.batch - first_image_);
    first_row_ = item % c_.bands() * c_.plan.rows;
    end_row_ = std::min(first_row_ + c_.plan.rows, c_.y.out);
    if (first_row_ >= end_row_) {
      return;
    }
    pack();
    plan_blocks();
    const int64_t column_blocks = c_.column_blocks(), slots = static_cast<int64_t>(blocks_.size());
    sink_->begin(column_blocks == 1 ? 1 : slots);
    for (int64_t column = 0; column < column_blocks; ++column) {
      const int64_t column_tiles = c_.outputs - column * block_columns > packed_columns ? 2 : 1;
      for (int64_t slot = 0; slot < slots; ++slot) {
        const Block& block = blocks_[slot];
        const TileSum sum{static_cast<int64_t>(block.taps),
                          c_.chunks(),
                          packed_,
                          a_offsets_.data() + block.first_tap,
                          plane_,
                          packed_tile,
                          c_.kernels + column * c_.column_block_size(),
                          b_offsets_.data() + block.first_tap,
                          2 * packed_tile,
                          packed_tile,
                          sums_,
                          block_columns,
                          false};
        tiles_.add(block.row_tiles, column_tiles, sum);
        if (column_blocks == 1) {
          sink_->take(0, column, sums_, block.pixels);
          sink_->finish(tiles_, 0, block.pixels);
        } else {
          sink_->take(slot, column, sums_, block.pixels);
        }
      }
    }
    if (column_blocks > 1) {
      for (int64_t slot = 0; slot < slots; ++slot) {
        sink_->finish(tiles_, slot, blocks_[slot].pixels);
      }
    }
  }

 private:
  int64_t row_length() const { return c_.columns.count * c_.plan.images; }  // in places

  void pack() {
    rows_ = rows_seen(c_.y, first_row_, end_row_, c_.plan.flat);
    const int64_t places = (rows_.end - rows_.first) * row_length();
    plane_ = (places + block_pixels) * packed_depth;  // the last block may read beyond
    packed_ = memory_.at_least(plane_ * c_.chunks());
    for (int64_t row = rows_.first; row < rows_.end; ++row) {
      BFloat16* const target = packed_ + (row - rows_.first) * row_length() * packed_depth;
      for (int64_t image = 0; image < images_; ++image) {
        const bool inside = row >= 0 && row < c_.in.height;
        widest<PackPixels>(inside ? c_.in.pixel(first_image_ + image, row, 0) : nullptr, c_.in.pixel_stride,
                           inside ? c_.in.width : 0, c_.in.channels, c_.columns, c_.plan.images, plane_,
                           target + image * packed_depth);
      }
    }
  }

  void plan_blocks() {
    blocks_.clear();
    a_offsets_.clear();
    b_offsets_.clear();
    if (c_.plan.flat) {
      add_blocks(first_row_, 0, ((end_row_ - first_row_ - 1) * c_.columns.count + c_.x.out) * c_.plan.images);
      return;
    }
    for (int64_t row = first_row_; row < end_row_; ++row) {
      for (int64_t phase = 0; phase < c_.x.classes; ++phase) {
        add_blocks(row, phase, c_.x.count(phase) * c_.plan.images);
      }
    }
  }

  // Of `places` outputs from the beginning of a row.
  void add_blocks(int64_t row, int64_t phase, int64_t places) {
    const bool flat = c_.plan.flat;
    for (int64_t first = 0; first < places; first += block_pixels) {
      const int64_t count = std::min(block_pixels, places - first);
      Block block;
      block.row_tiles = count > packed_rows ? 2 : 1;
      block.first_tap = a_offsets_.size();
      const int64_t first_column = first / c_.plan.images, last_column = (first + count - 1) / c_.plan.images;
      number_pixels(row, phase, first, count, block.pixels);
      for (const AxisMap::Tap& y : c_.y.taps[row % c_.y.classes]) {
        const int64_t input_row = row / c_.y.classes * c_.y.step + y.start;
        if (!flat && (input_row < 0 || input_row >= c_.y.in)) {
          continue;
        }
        const int64_t row_place = (input_row - rows_.first) * row_length() + first;
        const int64_t* column = columns_.data() + (phase == 0 ? 0 : first_columns_[phase - 1]);
        for (const AxisMap::Tap& x : c_.x.taps[phase]) {
          const int64_t place = row_place + *column++;
          if (!flat && !c_.x.any_sees(x, first_column, last_column)) {
            continue;
          }
          a_offsets_.push_back(place * packed_depth);
          b_offsets_.push_back((y.index * c_.kernel_width + x.index) * c_.tap_size());
        }
      }
      block.taps = a_offsets_.size() - block.first_tap;
      blocks_.push_back(block);
    }
  }

  // The numbers of the outputs in `count` places from `first`.
  void number_pixels(int64_t row, int64_t phase, int64_t first, int64_t count, int64_t* pixels) const {
    const int64_t images = c_.plan.images, length = c_.plan.flat ? c_.columns.count : first + count;
    int64_t image = first % images, column = first / images;
    row += column / length;
    column %= length;
    std::fill_n(pixels, block_pixels, int64_t{-1});
    if (!c_.plan.flat && (images == 1 || images == block_pixels)) {  // of one image, or one of each
      const int64_t number = (first_image_ * c_.y.out + row) * c_.x.out + phase + column * c_.x.classes;
      const int64_t step = images == 1 ? c_.x.classes : c_.y.out * c_.x.out;
      for (int64_t p = 0; p < std::min(count, images == 1 ? count : images_); ++p) {
        pixels[p] = number + p * step;
      }
      return;
    }
    for (int64_t p = 0; p < count; ++p) {
      const int64_t x = phase + column * c_.x.classes;
      if (image < images_ && x < c_.x.out) {
        pixels[p] = ((first_image_ + image) * c_.y.out + row) * c_.x.out + x;
      }
      if (++image == images) {
        image = 0;
        if (++column == length) {
          column = 0;
          ++row;
        }
      }
    }
  }

  const Convolution& c_;
  const std::unique_ptr<Sink> sink_;
  const TileSums tiles_;
  int64_t first_image_ = 0, images_ = 0, first_row_ = 0, end_row_ = 0;
  Rows rows_{0, 0};
  Scratch<BFloat16> memory_;
  BFloat16* packed_ = nullptr;
  int64_t plane_ = 0;
  std::vector<int64_t> columns_;       // places of the taps' first inputs, phase by phase
  std::vector<size_t> first_columns_;  // where those of the next phase begin
  std::vector<Block> blocks_;
  std::vector<int64_t> a_offsets_, b_offsets_;
  alignas(64) float sums_[block_pixels * block_columns] = {};
};

at::Tensor pack_kernels(const Kernels<const BFloat16>& kernels, int64_t height, int64_t width) {
  const int64_t taps = height * width, blocks = at::divup(kernels.outputs, block_columns);
  const int64_t tap_size = packed_matrix_size(kernels.inputs, 1);
  const at::Tensor packed = at::empty({blocks * taps * tap_size}, at::kBFloat16);
  BFloat16* const out = packed.mutable_data_ptr<BFloat16>();
  at::parallel_for(0, taps, at::divup(1 << 16, blocks * tap_size), [&](int64_t begin, int64_t end) {
    for (int64_t tap = begin; tap < end; ++tap) {
      pack_matrix(kernels.data + tap / width * kernels.row_stride + tap % width * kernels.tap_stride, kernels.inputs,
                  kernels.in_stride, kernels.outputs, kernels.out_stride, taps * tap_size, out + tap * tap_size);
    }
  });
  return packed;
}

void run(const Convolution& convolution, const MakeSink& make_sink) {
  at::parallel_for(0, convolution.items(), 1, [&](int64_t begin, int64_t end) {
    Worker worker(convolution, make_sink());
    for (int64_t item = begin; item < end; ++item) {
      worker.run(item);
    }
  });
}

}  // namespace

void direct_tiles_convolution(const Images<const BFloat16>& in, const Kernels<const BFloat16>& kernels,
                              const Sliding& y, const Sliding& x, int64_t out_height, int64_t out_width,
                              const MakeSink& make_sink) {
  const at::Tensor packed = pack_kernels(kernels, y.kernel, x.kernel);
  run(Convolution(in, forward_map(y, in.height, out_height), forward_map(x, in.width, out_width), y, x, kernels.outputs,
                  packed.const_data_ptr<BFloat16>()),
      make_sink);
}

void direct_tiles_input_gradient(const Images<const BFloat16>& gradient, const Kernels<const BFloat16>& kernels,
                                 const Sliding& y, const Sliding& x, int64_t in_height, int64_t in_width,
                                 const MakeSink& make_sink) {
  Kernels<const BFloat16> transposed = kernels;
  std::swap(transposed.inputs, transposed.outputs);
  std::swap(transposed.in_stride, transposed.out_stride);
  const at::Tensor packed = pack_kernels(transposed, y.kernel, x.kernel);
  run(Convolution(gradient, gradient_map(y, in_height, gradient.height), gradient_map(x, in_width, gradient.width), y,
                  x, kernels.inputs, packed.const_data_ptr<BFloat16>()),
      make_sink);
}

}  // namespace growkernels::convolution
