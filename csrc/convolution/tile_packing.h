#pragma once
// Between images in channels_last order and packed tiles (bfloat16_tile_sums.h).

#include "common/bfloat16_tile_sums.h"
#include "common/pack.h"
#include "convolution/axis_map.h"

#include <algorithm>
#include <cstdint>

namespace growkernels::convolution {

// The pixels of a row of an image, as rows of A: places are `place_rows` rows apart, blocks of 32 channels `plane`
// elements. Zeros beyond the image and behind the last channel.
struct PackPixels {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const at::BFloat16* row, int64_t pixel_stride, int64_t width,
                                                int64_t channels, PackedAxis axis, int64_t place_rows, int64_t plane,
                                                at::BFloat16* out) {
    using V = Vector<uint16_t, bytes>;
    constexpr int64_t vectors = packed_depth * 2 / bytes, lanes = bytes / 2;
    const int64_t whole = channels / packed_depth, chunks = (channels + packed_depth - 1) / packed_depth;
    const int64_t first = axis.lowest;
    for (int64_t phase = 0, q = 0, place = 0; place < axis.count; ++place, out += place_rows * packed_depth) {
      const int64_t i = first + phase + q * axis.step;
      if (++q == axis.pitch) {
        q = 0;
        ++phase;
      }
      if (i < 0 || i >= width) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          std::fill_n(out + chunk * plane, packed_depth, at::BFloat16(0));
        }
        continue;
      }
      const at::BFloat16* const pixel = row + i * pixel_stride;
      for (int64_t chunk = 0; chunk < whole; ++chunk) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) {
          *reinterpret_cast<V*>(out + chunk * plane + v * lanes) =
              *reinterpret_cast<const V*>(pixel + chunk * packed_depth + v * lanes);
        }
      }
      if (whole < chunks) {
        at::BFloat16* const last = out + whole * plane;
        const int64_t rest = channels - whole * packed_depth;
        std::copy_n(pixel + whole * packed_depth, rest, last);
        std::fill_n(last + rest, packed_depth - rest, at::BFloat16(0));
      }
    }
  }
};

// Rows of `count` tiles of A out of 32 rows of 16-bit values in as many places of memory: [tile][16][32].
struct PackTransposed {
  struct Source {
    using Element = at::BFloat16;
    using Out = at::BFloat16;
    const at::BFloat16* const* rows;
    int64_t first;
    [[gnu::always_inline]] inline Element operator()(int64_t m, int64_t i) const { return rows[m][first + i]; }
    [[gnu::always_inline]] static inline Out out(Element x) { return x; }
  };

  // `next` is from tile to tile.
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const at::BFloat16* const* rows, int64_t columns, int64_t next,
                                                at::BFloat16* out) {
    for (int64_t first = 0; first < columns; first += packed_rows, out += next) {
      const int64_t width = std::min(packed_rows, columns - first);
      if (width == packed_rows) {
        Transpose<Source>::run<bytes>(Source{rows, first}, packed_depth, packed_depth, packed_rows, out);
      } else {
        Transpose<Source>::run<bytes>(Source{rows, first}, packed_depth, packed_depth, width, out);
        std::fill(out + width * packed_depth, out + packed_tile, at::BFloat16(0));
      }
    }
  }
};

// Rows of 16-bit values in as many places of memory as pairs of rows of tiles of B, which are `next` elements apart.
struct PackPairs {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const at::BFloat16* const* rows, int64_t count, int64_t columns,
                                                int64_t next, at::BFloat16* out) {
    using Pair [[gnu::may_alias]] = uint32_t;
    for (int64_t row = 0; row < count; row += 2, out += 2 * packed_columns) {
      const at::BFloat16* even = rows[row];
      const at::BFloat16* odd = rows[row + 1];
      at::BFloat16* target = out;
      int64_t first = 0;
      for (; first + packed_columns <= columns; first += packed_columns, target += next) {
        Pair* const pairs = reinterpret_cast<Pair*>(target);
        for (int64_t j = 0; j < packed_columns; ++j) {
          pairs[j] = uint32_t{even[first + j].x} | uint32_t{odd[first + j].x} << 16;
        }
      }
      if (first < columns) {
        Pair* const pairs = reinterpret_cast<Pair*>(target);
        for (int64_t j = 0; j < packed_columns; ++j) {
          pairs[j] = first + j < columns ? uint32_t{even[first + j].x} | uint32_t{odd[first + j].x} << 16 : 0;
        }
      }
    }
  }
};

[[gnu::always_inline]] inline at::BFloat16 rounded(float x) {
  return {static_cast<uint16_t>(bfloat16_bits(x)), at::BFloat16::from_bits()};
}

// Sums rounded to bfloat16.
struct RoundSums {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* sums, int64_t count, at::BFloat16* out) {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = rounded(sums[j]);
    }
  }
};

// `count` elements of 32 rows of 32, each row into its own place: pixels[row] * stride in `out`, nowhere if that is
// negative. A float for each column is added before they are rounded, if given.
template <typename In>
struct StoreRows {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const In* in, const float* more, int64_t count, const int64_t* pixels,
                                                at::BFloat16* out, int64_t stride) {
    const auto store = [&](int64_t width, bool plain) __attribute__((always_inline)) {
      for (int64_t row = 0; row < 2 * packed_rows; ++row) {
        if (pixels[row] < 0) {
          continue;
        }
        const In* const source = in + row * packed_depth;
        at::BFloat16* const target = out + pixels[row] * stride;
        for (int64_t j = 0; j < width; ++j) {
          // Not copied as a whole: a load of 64 bytes would wait for the two stores of 32 that just made them.
          target[j] = rounded(plain ? cast<float>(source[j]) : cast<float>(source[j]) + more[j]);
        }
      }
    };
    if (more == nullptr) {
      count == packed_depth ? store(packed_depth, true) : store(count, true);
    } else {
      store(count, false);
    }
  }
};

// The matrix whose element (k, column) is at data + k * depth_stride + column * column_stride, as pairs of tiles of
// B: [block of 32 columns][block of 32 of k][2 tiles], the first of which are `next` elements apart. Zeros pad both.
// One of the strides is 1.
int64_t packed_matrix_size(int64_t depth, int64_t columns);
void pack_matrix(const at::BFloat16* data, int64_t depth, int64_t depth_stride, int64_t columns, int64_t column_stride,
                 int64_t next, at::BFloat16* out);

}  // namespace growkernels::convolution
