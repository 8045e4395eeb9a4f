#pragma once
// Winograd's minimal filtering F(4x4, 3x3): 16 outputs of a 3 x 3 convolution from 36 products instead
// of 144. With d a 6 x 6 patch of the input, g the kernel and y the 4 x 4 patch of the output,
//   y  = A^T [(G g G^T) * (B^T d B)] A        (forward, and the input's gradient with g turned around)
//   dg = G^T [(A dy A^T) * (B^T d B)] G       (the kernel's gradient: the transposed algorithm)
// where * is elementwise per channel pair, so that over many patches it is 36 matrix products.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.3.
//
// Everything here is one vector of channels wide and free of torch.

#include "common/vector_width.h"

#include <cstdint>

namespace growkernels::convolution {

constexpr int tile_outputs = 4;  // per axis
constexpr int tile_inputs = 6;   // per axis
constexpr int frequencies = tile_inputs * tile_inputs;

// The interpolation points are 0, +-a, +-1/a and infinity. Points in reciprocal pairs keep the transforms'
// entries close to one; with a = 2/3 the rounding error is a quarter of that of the usual 0, +-1, +-2.
constexpr float a1 = 2.f / 3, a2 = a1 * a1, a3 = a1 * a2;
constexpr float b1 = 3.f / 2, b2 = b1 * b1, b3 = b1 * b2;
constexpr float scale_a = 1 / (2 * a2 * (a2 - b2)), scale_b = 1 / (2 * b2 * (b2 - a2));

// The one-dimensional transforms, on vectors V that are in_step and out_step apart.
struct InputTransform {  // B^T
  static constexpr int from = 6, to = 6;
  template <typename V>
  [[gnu::always_inline]] static inline void apply(const V* d, V* o, int in_step, int out_step) {
    const V d1 = d[in_step], d2 = d[2 * in_step], d3 = d[3 * in_step], d4 = d[4 * in_step];
    const V even_a = d4 - b2 * d2, odd_a = a1 * d3 - (a1 * b2) * d1;
    const V even_b = d4 - a2 * d2, odd_b = b1 * d3 - (b1 * a2) * d1;
    o[0] = d[0] + d4 - (a2 + b2) * d2;
    o[out_step] = even_a + odd_a;
    o[2 * out_step] = even_a - odd_a;
    o[3 * out_step] = even_b + odd_b;
    o[4 * out_step] = even_b - odd_b;
    o[5 * out_step] = d1 + d[5 * in_step] - (a2 + b2) * d3;
  }
};

struct OutputTransform {  // A^T
  static constexpr int from = 6, to = 4;
  template <typename V>
  [[gnu::always_inline]] static inline void apply(const V* m, V* o, int in_step, int out_step) {
    const V sum_a = m[in_step] + m[2 * in_step], difference_a = m[in_step] - m[2 * in_step];
    const V sum_b = m[3 * in_step] + m[4 * in_step], difference_b = m[3 * in_step] - m[4 * in_step];
    o[0] = m[0] + sum_a + sum_b;
    o[out_step] = a1 * difference_a + b1 * difference_b;
    o[2 * out_step] = a2 * sum_a + b2 * sum_b;
    o[3 * out_step] = a3 * difference_a + b3 * difference_b + m[5 * in_step];
  }
};

struct GradientTransform {  // A
  static constexpr int from = 4, to = 6;
  template <typename V>
  [[gnu::always_inline]] static inline void apply(const V* y, V* o, int in_step, int out_step) {
    const V y0 = y[0], y1 = y[in_step], y2 = y[2 * in_step], y3 = y[3 * in_step];
    const V even_a = y0 + a2 * y2, odd_a = a1 * y1 + a3 * y3, even_b = y0 + b2 * y2, odd_b = b1 * y1 + b3 * y3;
    o[0] = y0;
    o[out_step] = even_a + odd_a;
    o[2 * out_step] = even_a - odd_a;
    o[3 * out_step] = even_b + odd_b;
    o[4 * out_step] = even_b - odd_b;
    o[5 * out_step] = y3;
  }
};

struct KernelTransform {  // G
  static constexpr int from = 3, to = 6;
  template <typename V>
  [[gnu::always_inline]] static inline void apply(const V* g, V* o, int in_step, int out_step) {
    const V g0 = g[0], g1 = g[in_step], g2 = g[2 * in_step];
    const V even_a = scale_a * g0 + (scale_a * a2) * g2, odd_a = (scale_a * a1) * g1;
    const V even_b = scale_b * g0 + (scale_b * b2) * g2, odd_b = (scale_b * b1) * g1;
    o[0] = g0;
    o[out_step] = even_a + odd_a;
    o[2 * out_step] = even_a - odd_a;
    o[3 * out_step] = even_b + odd_b;
    o[4 * out_step] = even_b - odd_b;
    o[5 * out_step] = g2;
  }
};

struct KernelGradientTransform {  // G^T
  static constexpr int from = 6, to = 3;
  template <typename V>
  [[gnu::always_inline]] static inline void apply(const V* v, V* o, int in_step, int out_step) {
    const V sum_a = v[in_step] + v[2 * in_step], difference_a = v[in_step] - v[2 * in_step];
    const V sum_b = v[3 * in_step] + v[4 * in_step], difference_b = v[3 * in_step] - v[4 * in_step];
    o[0] = v[0] + scale_a * sum_a + scale_b * sum_b;
    o[out_step] = (scale_a * a1) * difference_a + (scale_b * b1) * difference_b;
    o[2 * out_step] = (scale_a * a2) * sum_a + (scale_b * b2) * sum_b + v[5 * in_step];
  }
};

// The two-dimensional transform: load(i, v) sets v to element i of a row-major [from, from] square of
// vectors, store(i, v) takes element i of [to, to].
template <typename Transform, typename V, typename Load, typename Store>
[[gnu::always_inline]] inline void transform_square(const Load& load, const Store& store) {
  constexpr int from = Transform::from, to = Transform::to;
  V half[to * from];
#pragma GCC unroll 6
  for (int column = 0; column < from; ++column) {
    V values[from];
#pragma GCC unroll 6
    for (int row = 0; row < from; ++row) {
      load(row * from + column, values[row]);
    }
    Transform::apply(values, half + column, 1, from);
  }
#pragma GCC unroll 6
  for (int row = 0; row < to; ++row) {
    V values[to];
    Transform::apply(half + row * from, values, 1, 1);
#pragma GCC unroll 6
    for (int column = 0; column < to; ++column) {
      store(row * to + column, values[column]);
    }
  }
}

// Calls body(first channel, V{}) for vectors that cover `channels`; the last one overlaps the one
// before it where the count is no multiple, and counts below one vector go channel by channel. So
// a body must give the same result when it handles a channel twice.
template <int bytes, typename Body>
[[gnu::always_inline]] inline void for_channel_vectors(int64_t channels, const Body& body) {
  constexpr int64_t lanes = bytes / sizeof(float);
  if (channels < lanes) {
    for (int64_t c = 0; c < channels; ++c) {
      body(c, Vector<float, 4>{});
    }
    return;
  }
  for (int64_t c = 0; c + lanes <= channels; c += lanes) {
    body(c, Vector<float, bytes>{});
  }
  if (channels % lanes != 0) {
    body(channels - lanes, Vector<float, bytes>{});
  }
}

// A tile of pixels (36 of the input, or 16 of the output's gradient) becomes 36 frequencies, frequency f
// of channel c at out[f * frequency_stride + c].
template <typename Transform>
struct PixelsToFrequencies {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* const* pixels, float* out, int64_t frequency_stride,
                                                int64_t channels) {
    for_channel_vectors<bytes>(channels, [&](int64_t c, auto zero) __attribute__((always_inline)) {
      using V = decltype(zero);
      transform_square<Transform, V>(
          [&](int p, V& value) __attribute__((always_inline)) { value = *reinterpret_cast<const V*>(pixels[p] + c); },
          [&](int f, const V& value)
              __attribute__((always_inline)) { *reinterpret_cast<V*>(out + f * frequency_stride + c) = value; });
    });
  }
};

// The way back: 36 frequencies become the 16 output pixels; those that are null lie outside.
struct FrequenciesToPixels {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* in, int64_t frequency_stride, float* const* pixels,
                                                int64_t channels) {
    for_channel_vectors<bytes>(channels, [&](int64_t c, auto zero) __attribute__((always_inline)) {
      using V = decltype(zero);
      transform_square<OutputTransform, V>(
          [&](int f, V& value)
              __attribute__((always_inline)) { value = *reinterpret_cast<const V*>(in + f * frequency_stride + c); },
          [&](int p, const V& value) __attribute__((always_inline)) {
            if (pixels[p] != nullptr) {
              *reinterpret_cast<V*>(pixels[p] + c) = value;
            }
          });
    });
  }
};

}  // namespace growkernels::convolution
