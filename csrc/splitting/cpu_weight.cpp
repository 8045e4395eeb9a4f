// w = grad * act''(preact) on the CPU, in one pass over memory.

#include "common/activation.h"
#include "common/kernels_ran.h"
#include "common/pack.h"
#include "splitting/splitting.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

// Registers are passed and returned by functions that are always inlined; there is no ABI to warn of.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace growkernels::splitting {
namespace {

// act''(z) of one register. Written with exp(-|u|) and 1 - exp(-|u|) rather than with 1 - sigmoid or
// 1 - tanh^2, so that nothing cancels in the tails.
template <typename T, int bytes>
struct Second {
  using V = Vector<T, bytes>;

  [[gnu::always_inline]] static inline V magnitude(V z) { return z < 0 ? -z : z; }
  // `size` with the sign of z.
  [[gnu::always_inline]] static inline V signed_like(V size, V z) { return z < 0 ? -size : size; }

  // Beyond it exp(-z) is zero in every type, and the polynomials it is multiplied by may overflow.
  [[gnu::always_inline]] static inline V bounded(V z) {
    const V bound = V{} + T(1000);
    return z > bound ? bound : z < -bound ? -bound : z;  // keeps NaN
  }

  [[gnu::always_inline]] static inline V gelu(V value) {
    const V z = bounded(value);
    const V square = z * z;
    return Decay<T>::template of<bytes>(square * T(0.5)).power * T(M_2_SQRTPI * M_SQRT1_2 / 2) * (T(2) - square);
  }

  [[gnu::always_inline]] static inline V gelu_tanh(V value) {
    const V z = bounded(value);
    constexpr T scale = T(M_2_SQRTPI * M_SQRT1_2), cubic = T(0.044715);
    const V square = z * z, u = scale * z * (T(1) + cubic * square);
    const auto decay = Decay<T>::template of<bytes>(T(2) * magnitude(u));
    const V sum = T(1) + decay.power, t = signed_like(decay.rest / sum, z);
    const V first = scale * (T(1) + T(3) * cubic * square), second = T(6) * scale * cubic * z;
    return T(4) * decay.power / (sum * sum) * (first + T(0.5) * z * (second - T(2) * t * first * first));
  }

  [[gnu::always_inline]] static inline V tanh(V z) {
    const auto decay = Decay<T>::template of<bytes>(T(2) * magnitude(z));
    const V sum = T(1) + decay.power;
    return signed_like(T(-8) * decay.power * decay.rest / (sum * sum * sum), z);
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

  [[gnu::always_inline]] static inline V silu(V value) {
    const V z = bounded(value);
    const Logistic s = logistic(z);
    return s.bell * (T(2) + z * s.tilt);
  }
  [[gnu::always_inline]] static inline V sigmoid(V z) {
    const Logistic s = logistic(z);
    return s.bell * s.tilt;
  }
  [[gnu::always_inline]] static inline V softplus(V z, T beta) { return beta * logistic(beta * z).bell; }
};

// z[i] = g[i] act''(z[i]), in place.
template <typename T, Activation activation>
struct Weigh {
  template <int bytes>
  [[gnu::always_inline]] static inline Vector<T, bytes> second(Vector<T, bytes> z, T beta) {
    using S = Second<T, bytes>;
    if constexpr (activation == Activation::Gelu) {
      return S::gelu(z);
    } else if constexpr (activation == Activation::GeluTanh) {
      return S::gelu_tanh(z);
    } else if constexpr (activation == Activation::Silu) {
      return S::silu(z);
    } else if constexpr (activation == Activation::Tanh) {
      return S::tanh(z);
    } else if constexpr (activation == Activation::Sigmoid) {
      return S::sigmoid(z);
    } else {
      return S::softplus(z, beta);
    }
  }

  template <int bytes>
  [[gnu::always_inline]] static inline void run(const T* g, T* z, int64_t count, T beta) {
    using V = Vector<T, bytes>;
    constexpr int lanes = bytes / sizeof(T);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      V& target = *reinterpret_cast<V*>(z + i);
      target = *reinterpret_cast<const V*>(g + i) * second<bytes>(target, beta);
    }
    for (; i < count; ++i) {
      z[i] = g[i] * second<bytes>(V{} + z[i], beta)[0];
    }
  }
};

template <typename T>
void weigh(const T* g, T* z, int64_t count, const Curvature& curvature) {
  const T beta = static_cast<T>(curvature.beta);
  switch (curvature.activation) {
    case Activation::Gelu:
      return widest<Weigh<T, Activation::Gelu>>(g, z, count, beta);
    case Activation::GeluTanh:
      return widest<Weigh<T, Activation::GeluTanh>>(g, z, count, beta);
    case Activation::Silu:
      return widest<Weigh<T, Activation::Silu>>(g, z, count, beta);
    case Activation::Tanh:
      return widest<Weigh<T, Activation::Tanh>>(g, z, count, beta);
    case Activation::Sigmoid:
      return widest<Weigh<T, Activation::Sigmoid>>(g, z, count, beta);
    case Activation::Softplus:
      return widest<Weigh<T, Activation::Softplus>>(g, z, count, beta);
  }
}

template <typename In>
void weigh_all(at::TensorIteratorBase& iterator, const Curvature& curvature) {
  using Acc = accumulate_t<In>;
  constexpr int64_t chunk = 512;  // of elements on their way through L1
  iterator.for_each([&](char** base, const int64_t* strides, int64_t count, int64_t rows) {
    Acc g[chunk], z[chunk];
    for (int64_t row = 0; row < rows; ++row) {
      const auto pointer = [&](int operand) { return base[operand] + row * strides[3 + operand]; };
      char* const out = pointer(0);
      const char *const grad = pointer(1), *const preact = pointer(2);
      for (int64_t begin = 0; begin < count; begin += chunk) {
        const int64_t length = std::min(chunk, count - begin);
        for (int64_t i = 0; i < length; ++i) {
          g[i] = cast<Acc>(*reinterpret_cast<const In*>(grad + (begin + i) * strides[1]));
          z[i] = cast<Acc>(*reinterpret_cast<const In*>(preact + (begin + i) * strides[2]));
        }
        weigh<Acc>(g, z, length, curvature);
        for (int64_t i = 0; i < length; ++i) {
          *reinterpret_cast<In*>(out + (begin + i) * strides[0]) = static_cast<In>(z[i]);
        }
      }
    }
  });
}

at::Tensor weight(const Weight& call, const Curvature& curvature) {
  note(Ran::Portable);
  const at::Tensor &grad = call.grad, &preact = call.preact;
  const at::Tensor w = at::empty_like(preact);
  at::TensorIterator iterator =
      at::TensorIteratorConfig().add_output(w).add_const_input(grad).add_const_input(preact).build();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, preact.scalar_type(), "splitting_weight",
                                  [&] { weigh_all<scalar_t>(iterator, curvature); });
  return w;
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CPU, m) { m.impl("splitting_weight", &Unpacked<Weight>::run<checked<weight>>); }

}  // namespace growkernels::splitting
