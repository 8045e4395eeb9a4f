// w = grad * act''(preact) on the CPU, in one pass over memory.

#include "common/activation_vector.h"
#include "common/kernels_ran.h"
#include "common/pack.h"
#include "splitting/splitting.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

// Registers are passed and returned by functions that are always inlined; there is no ABI to warn of.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace growkernels::splitting {
namespace {

// z[i] = g[i] act''(z[i]), in place.
template <typename T, Activation activation>
struct Weigh {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const T* g, T* z, int64_t count, T beta) {
    using V = Vector<T, bytes>;
    constexpr int lanes = bytes / sizeof(T);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      V& target = *reinterpret_cast<V*>(z + i);
      target = *reinterpret_cast<const V*>(g + i) * SecondDerivative<T, bytes>::template of<activation>(target, beta);
    }
    for (; i < count; ++i) {
      z[i] = g[i] * SecondDerivative<T, bytes>::template of<activation>(V{} + z[i], beta)[0];
    }
  }
};

template <typename T>
void weigh(const T* g, T* z, int64_t count, const Curvature& curvature) {
  const T beta = static_cast<T>(curvature.beta);
  with_activation<Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Tanh, Activation::Sigmoid,
                  Activation::Softplus>(
      curvature.activation, [&]<Activation activation>() { widest<Weigh<T, activation>>(g, z, count, beta); });
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
