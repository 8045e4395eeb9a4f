#pragma once
// Loops that bring tensors into the layout and element type of a tile product's operands, while they
// are loaded into cache. They read torch's tensors in place.

#include "common/gemm_tile.h"
#include "common/vector_width.h"

#include <algorithm>
#include <cstdint>

namespace growkernels {

// Row-major, `stride` from row to row.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

// bfloat16 is the upper half of a float32: widening is a shift, and so is the way back for a value
// that was bfloat16 before. Written as shifts because compilers vectorise those.
template <typename Out, typename In>
[[gnu::always_inline]] inline Out cast(In x) {
  if constexpr (std::is_same_v<In, at::BFloat16> && std::is_same_v<Out, float>) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(x.x) << 16);
  } else if constexpr (std::is_same_v<In, float> && std::is_same_v<Out, at::BFloat16>) {
    return at::BFloat16(static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x) >> 16), at::BFloat16::from_bits());
  } else {
    return static_cast<Out>(x);
  }
}

// The bits of x as bfloat16; float32 is rounded to nearest even.
template <typename In>
[[gnu::always_inline]] inline uint32_t bfloat16_bits(In x) {
  if constexpr (std::is_same_v<In, at::BFloat16>) {
    return x.x;
  } else {
    const uint32_t whole = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
    const bool is_nan = (whole & 0x7fffffff) > 0x7f800000;
    return is_nan ? 0x7fc0 : rounded;
  }
}

// Transposes a square of registers: after the step with distance d, the halves of every pair of rows
// d apart have changed places.
template <typename T, int bytes, int distance, typename Integer>
[[gnu::always_inline]] inline void transpose_registers(Vector<T, bytes>* rows) {
  constexpr int lanes = bytes / sizeof(T);
  using Indices [[gnu::vector_size(bytes)]] = Integer;
  Indices upper, lower;
  for (int j = 0; j < lanes; ++j) {
    upper[j] = (j & distance) == 0 ? j : lanes + j - distance;
    lower[j] = (j & distance) == 0 ? j + distance : lanes + j;
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if ((i & distance) == 0) {
      const Vector<T, bytes> first = rows[i], second = rows[i + distance];
      rows[i] = __builtin_shuffle(first, second, upper);
      rows[i + distance] = __builtin_shuffle(first, second, lower);
    }
  }
  if constexpr (distance > 1) {
    transpose_registers<T, bytes, distance / 2, Integer>(rows);
  }
}

// out[i, m] = source(m, i) for m < depth, i < width; zeros for m from depth to padded_depth, the length
// of out's rows. Elements change places in registers: Source::Out Source::out(Source::Element) is what is
// stored, 16-bit values two at a time.
template <typename Source>
struct Transpose {
  using Element = typename Source::Element;
  using Out = typename Source::Out;
  static constexpr bool paired = sizeof(Out) == 2;
  using Lane = std::conditional_t<paired, uint32_t, Element>;
  using Index = std::conditional_t<sizeof(Lane) == 8, int64_t, int32_t>;
  static constexpr int64_t lane_depth = paired ? 2 : 1;

  [[gnu::always_inline]] static inline Lane lane(const Source& source, int64_t m, int64_t i) {
    if constexpr (paired) {
      const uint32_t first = Source::out(source(m, i)).x, second = Source::out(source(m + 1, i)).x;
      return first | second << 16;
    } else {
      return source(m, i);
    }
  }

  template <int bytes>
  [[gnu::always_inline]] static inline void run(Source source, int64_t depth, int64_t padded_depth, int64_t width,
                                                Out* out) {
    using Anywhere [[gnu::vector_size(bytes), gnu::aligned(alignof(Out)), gnu::may_alias]] = Lane;
    constexpr int64_t block = bytes / sizeof(Lane), block_depth = block * lane_depth;
    const int64_t full_depth = depth / block_depth * block_depth, full_width = width / block * block;
    for (int64_t m = 0; m < full_depth; m += block_depth) {
      for (int64_t i = 0; i < full_width; i += block) {
        Vector<Lane, bytes> rows[block];
#pragma GCC unroll 16
        for (int64_t r = 0; r < block; ++r) {
          Lane values[block];
          for (int64_t q = 0; q < block; ++q) {
            values[q] = lane(source, m + r * lane_depth, i + q);
          }
          rows[r] = *reinterpret_cast<const Vector<Lane, bytes>*>(values);
        }
        transpose_registers<Lane, bytes, block / 2, Index>(rows);
#pragma GCC unroll 16
        for (int64_t q = 0; q < block; ++q) {
          Out* target = out + (i + q) * padded_depth + m;
          if constexpr (paired) {
            *reinterpret_cast<Anywhere*>(target) = rows[q];
          } else {
            for (int64_t r = 0; r < block; ++r) {
              target[r] = Source::out(rows[q][r]);
            }
          }
        }
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t m = i < full_width ? full_depth : 0; m < depth; ++m) {
        out[i * padded_depth + m] = Source::out(source(m, i));
      }
      for (int64_t m = depth; m < padded_depth; ++m) {
        out[i * padded_depth + m] = Out(0);
      }
    }
  }
};

// A source of Transpose: rows `stride` apart, as they are.
template <typename In, typename To>
struct Column {
  using Element = accumulate_t<In>;
  using Out = To;
  const In* data;
  int64_t stride;
  [[gnu::always_inline]] inline Element operator()(int64_t m, int64_t i) const {
    return cast<Element>(data[m * stride + i]);
  }
  [[gnu::always_inline]] static inline Out out(Element x) { return cast<Out>(x); }
};

// Rows of x, widened and scaled.
template <typename In, typename Out>
struct Widen {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const In* x, int64_t stride, int64_t depth, int64_t width, Out scale,
                                                Out* out) {
    if (stride == width) {  // one long row: short ones would leave the registers mostly empty
      width *= depth;
      depth = 1;
    }
    for (int64_t m = 0; m < depth; ++m) {
      for (int64_t j = 0; j < width; ++j) {
        out[m * width + j] = scale * cast<Out>(x[m * stride + j]);
      }
    }
  }
};

// The layout that bfloat16 tiles want: rows in pairs, interleaved (bfloat16_tile.h), and zeros for those from
// depth to padded_depth, which is even. float32 is rounded to nearest even.
template <typename In>
struct InterleaveRows {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const In* x, int64_t stride, int64_t depth, int64_t padded_depth,
                                                int64_t width, at::BFloat16* out) {
    for (int64_t m = 0; m < depth; m += 2) {
      const In* even = x + m * stride;
      using Pair [[gnu::may_alias]] = uint32_t;
      Pair* pairs = reinterpret_cast<Pair*>(out + m * width);
      if (m + 1 < depth) {
        const In* odd = even + stride;
        for (int64_t j = 0; j < width; ++j) {
          pairs[j] = bfloat16_bits(even[j]) | bfloat16_bits(odd[j]) << 16;
        }
      } else {
        for (int64_t j = 0; j < width; ++j) {
          pairs[j] = bfloat16_bits(even[j]);
        }
      }
    }
    const int64_t done = (depth + 1) / 2 * 2 * width;
    std::fill(out + done, out + padded_depth * width, at::BFloat16(0));
  }
};

}  // namespace growkernels
