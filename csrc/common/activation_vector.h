#pragma once
// Activation functions and their second derivatives in the CPU's registers, called from inside its kernels.

#include "common/activation.h"
#include "common/vector_width.h"

#include <cmath>
#include <cstdint>
#include <type_traits>

// Registers are passed and returned by functions that are always inlined; there is no ABI to warn of.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

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
    const V number = y <= vanished ? y : V{} + vanished;  // NaN is no integer
    const I n = __builtin_convertvector(number * T(1.44269504088896340736) + T(0.5), I);
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

// act''(z) of one register. Written with exp(-|u|) and 1 - exp(-|u|) rather than with 1 - sigmoid or
// 1 - tanh^2, so that nothing cancels in the tails.
template <typename T, int bytes>
struct SecondDerivative {
  using V = Vector<T, bytes>;

  // `beta` belongs to Softplus.
  template <Activation activation>
  [[gnu::always_inline]] static inline V of(V value, T beta) {
    if constexpr (activation == Activation::Gelu) {
      const V z = bounded(value), square = z * z;
      return Decay<T>::template of<bytes>(square * T(0.5)).power * T(M_2_SQRTPI * M_SQRT1_2 / 2) * (T(2) - square);
    } else if constexpr (activation == Activation::GeluTanh) {
      constexpr T scale = T(M_2_SQRTPI * M_SQRT1_2), cubic = T(0.044715);
      const V z = bounded(value), square = z * z, u = scale * z * (T(1) + cubic * square);
      const auto decay = Decay<T>::template of<bytes>(T(2) * magnitude(u));
      const V sum = T(1) + decay.power, t = signed_like(decay.rest / sum, z);
      const V first = scale * (T(1) + T(3) * cubic * square), second = T(6) * scale * cubic * z;
      return T(4) * decay.power / (sum * sum) * (first + T(0.5) * z * (second - T(2) * t * first * first));
    } else if constexpr (activation == Activation::Tanh) {
      const auto decay = Decay<T>::template of<bytes>(T(2) * magnitude(value));
      const V sum = T(1) + decay.power;
      return signed_like(T(-8) * decay.power * decay.rest / (sum * sum * sum), value);
    } else if constexpr (activation == Activation::Silu) {
      const V z = bounded(value);
      const Logistic s = logistic(z);
      return s.bell * (T(2) + z * s.tilt);
    } else if constexpr (activation == Activation::Sigmoid) {
      const Logistic s = logistic(value);
      return s.bell * s.tilt;
    } else {
      static_assert(activation == Activation::Softplus);
      return beta * logistic(beta * value).bell;
    }
  }

 private:
  [[gnu::always_inline]] static inline V magnitude(V z) { return z < 0 ? -z : z; }
  // `size` with the sign of z.
  [[gnu::always_inline]] static inline V signed_like(V size, V z) { return z < 0 ? -size : size; }

  // Beyond it exp(-z) is zero in every type, and the polynomials it is multiplied by may overflow.
  [[gnu::always_inline]] static inline V bounded(V z) {
    const V bound = V{} + T(1000);
    return z > bound ? bound : z < -bound ? -bound : z;  // keeps NaN
  }

  // With s = sigmoid(z): s (1 - s), and 1 - 2 s.
  struct Logistic {
    V bell, tilt;
  };
  [[gnu::always_inline]] static inline Logistic logistic(V z) {
    const auto decay = Decay<T>::template of<bytes>(magnitude(z));
    const V sum = T(1) + decay.power;
    return {decay.power / (sum * sum), -signed_like(decay.rest / sum, z)};
  }
};

}  // namespace growkernels

#pragma GCC diagnostic pop
