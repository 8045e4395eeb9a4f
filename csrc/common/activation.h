#pragma once
// Activation functions on whole arrays, in place, called from inside the CPU kernels.

#include "common/vector_width.h"

#include <cstdint>
#include <type_traits>

namespace growkernels {

// exp(-y) and 1 - exp(-y) for y >= 0, neither of which cancels: with y = n ln 2 - r, |r| <= ln 2 / 2,
//   exp(-y) = 2^-n e^r,    1 - exp(-y) = (1 - 2^-n) - 2^-n (e^r - 1),
// and e^r - 1 is its Taylor series to below half a unit in the last place. Exactly 0 and 1 where the
// first is too small for a normal number. NaN comes through.
template <typename T>
struct Decay {
  static constexpr int terms = std::is_same_v<T, double> ? 14 : 8;
  static constexpr T vanished = std::is_same_v<T, double> ? T(708) : T(87);
  using Integer = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;
  static constexpr int mantissa_bits = std::is_same_v<T, double> ? 52 : 23;
  static constexpr Integer exponent_bias = std::is_same_v<T, double> ? 1023 : 127;

  template <int bytes>
  struct Parts {
    Vector<T, bytes> power, rest;
  };

  template <int bytes>
  [[gnu::always_inline]] static inline Parts<bytes> of(Vector<T, bytes> y) {
    using V = Vector<T, bytes>;
    using I = Vector<Integer, bytes>;
    const V bounded = y > vanished ? V{} + vanished : y;  // keeps NaN
    const I n = __builtin_convertvector(bounded * T(1.44269504088896340736) + T(0.5), I);
    const V whole = __builtin_convertvector(n, V);
    // ln 2 in two parts, the first with few enough bits that its product with n is exact.
    constexpr T ln2_high = std::is_same_v<T, double> ? T(0x1.62e42feep-1) : T(0x1.62ep-1);
    constexpr T ln2_low = T(0.693147180559945309417232121458L - static_cast<long double>(ln2_high));
    const V r = (whole * ln2_high - bounded) + whole * ln2_low;
    V series = V{} + T(1);
#pragma GCC unroll 16
    for (int k = terms; k > 1; --k) {
      series = series * r * T(1.0L / k) + T(1);
    }
    series *= r;
    const I scale_bits = (exponent_bias - n) << mantissa_bits;
    const V scale = reinterpret_cast<const V&>(scale_bits);
    const V power = scale * series + scale;
    return {y > vanished ? V{} : power, y > vanished ? V{} + T(1) : (T(1) - scale) - scale * series};
  }
};

// tanh x = (1 - t) / (1 + t) with t = exp(-2|x|). About four times as fast as the vendor's function on
// Zen 4, to within 3 units in the last place.
template <typename T>
struct Tanh {
  template <int bytes>
  [[gnu::always_inline]] static inline void apply(Vector<T, bytes>& x) {
    using V = Vector<T, bytes>;
    const V magnitude = x < 0 ? -x : x;
    const auto decay = Decay<T>::template of<bytes>(magnitude + magnitude);
    const V result = decay.rest / (T(1) + decay.power);
    x = x < 0 ? -result : result;
  }

  template <int bytes>
  [[gnu::always_inline]] static inline void run(T* x, int64_t count) {
    using V = Vector<T, bytes>;
    constexpr int lanes = bytes / sizeof(T);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      apply<bytes>(*reinterpret_cast<V*>(x + i));
    }
    for (; i < count; ++i) {
      V value = V{} + x[i];
      apply<bytes>(value);
      x[i] = value[0];
    }
  }
};

}  // namespace growkernels
