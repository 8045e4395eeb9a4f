#pragma once
// Loading: a chunk of samples becomes the two operands of a tile product, with the layer's mask,
// activation and scale applied on the way into cache. Torch's tensors are read once and never changed.

#include "common/activation_vector.h"
#include "common/pack.h"
#include "virtual_grad/virtual_grad.h"

#include <ATen/ops/clamp_min_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu_cpu_dispatch.h>
#include <ATen/ops/sigmoid_cpu_dispatch.h>
#include <ATen/ops/silu_cpu_dispatch.h>

#include <cstdint>

namespace growkernels::virtual_grad {

// g[m, i], or 0 where masked and h[m, i] <= 0 (the derivative of ReLU as torch takes it: 0 at 0, and NaN lets
// through): what Transpose makes the first operand of.
template <typename In, typename Operand, bool masked>
struct Gradient {
  using Element = accumulate_t<In>;
  using Out = Operand;
  using Integer = std::conditional_t<std::is_same_v<Element, double>, int64_t, int32_t>;

  const In* g;
  int64_t g_stride;
  const In* h;
  int64_t h_stride;

  // In integers: compilers make a branch of the select, and signs of activations are unpredictable.
  [[gnu::always_inline]] inline Element operator()(int64_t m, int64_t i) const {
    const Element value = cast<Element>(g[m * g_stride + i]);
    if constexpr (masked) {
      const Integer keep = static_cast<Integer>(cast<Element>(h[m * h_stride + i]) <= Element(0)) - 1;
      return __builtin_bit_cast(Element, __builtin_bit_cast(Integer, value) & keep);
    } else {
      return value;
    }
  }

  [[gnu::always_inline]] static inline Operand out(Element x) {
    if constexpr (std::is_same_v<In, float> && std::is_same_v<Operand, at::BFloat16>) {
      return at::BFloat16(static_cast<uint16_t>(bfloat16_bits(x)), at::BFloat16::from_bits());
    } else {
      return cast<Operand>(x);
    }
  }

  // Whether rows of that width follow each other without a gap.
  bool adjacent(int64_t width) const { return g_stride == width && (!masked || h_stride == width); }
};

// What Transpose takes, as contiguous rows without changing places.
template <typename Source>
struct KeepRows {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(Source source, int64_t rows, int64_t width, typename Source::Out* out) {
    if (source.adjacent(width)) {  // one long row: short ones would leave the registers mostly empty
      width *= rows;
      rows = 1;
    }
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < width; ++i) {
        out[m * width + i] = Source::out(source(m, i));
      }
    }
  }
};

// In place. Apart from tanh these are ATen's own vectorised functions, called below the dispatcher
// because this runs on worker threads.
template <typename Acc>
void activate_in_place(Acc* x, int64_t count, Activation activation) {
  if (activation == Activation::Tanh) {
    widest<Tanh<Acc>>(x, count);
    return;
  }
  at::Tensor view = at::from_blob(x, {count}, c10::CppTypeToScalarType<Acc>::value);
  switch (activation) {
    case Activation::Relu:
      at::cpu::clamp_min_out(view, view, 0);
      break;
    case Activation::Gelu:
      at::cpu::gelu_out(view, view);
      break;
    case Activation::Silu:
      at::cpu::silu_out(view, view);
      break;
    case Activation::Sigmoid:
      at::cpu::sigmoid_out(view, view);
      break;
    default:
      break;
  }
}

}  // namespace growkernels::virtual_grad
