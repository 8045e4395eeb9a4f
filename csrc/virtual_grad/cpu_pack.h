#pragma once
// Loading: a chunk of samples becomes the two operands of a tile product, with the layer's mask,
// activation and scale applied on the way into cache. Torch's tensors are read once and never changed.

#include "common/activation.h"
#include "common/gemm_tile.h"
#include "common/transpose.h"
#include "common/vector_width.h"
#include "virtual_grad/virtual_grad.h"

#include <ATen/ops/clamp_min_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu_cpu_dispatch.h>
#include <ATen/ops/sigmoid_cpu_dispatch.h>
#include <ATen/ops/silu_cpu_dispatch.h>

#include <algorithm>
#include <cstdint>

namespace growkernels::virtual_grad {

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

// A[i, m] = g[m, i], or 0 where masked and h[m, i] is not positive (the derivative of ReLU as torch
// takes it: 0 at 0). Columns from `depth` to `padded_depth` are zeros.
template <typename In, typename Operand, bool masked>
struct PackGradient {
  using Acc = accumulate_t<In>;  // elements change places in registers in this width
  using Integer = std::conditional_t<std::is_same_v<Acc, double>, int64_t, int32_t>;

  // In integers: compilers make a branch of the select, and signs of activations are unpredictable.
  [[gnu::always_inline]] static inline Acc element(In g, In h) {
    const Acc value = cast<Acc>(g);
    if constexpr (masked) {
      const Integer keep = -static_cast<Integer>(cast<Acc>(h) > Acc(0));
      return __builtin_bit_cast(Acc, __builtin_bit_cast(Integer, value) & keep);
    } else {
      return value;
    }
  }

  template <int bytes>
  [[gnu::always_inline]] static inline void run(const In* g, int64_t g_stride, const In* h, int64_t h_stride,
                                                int64_t depth, int64_t padded_depth, int64_t width, Operand* a) {
    constexpr int64_t block = bytes / sizeof(Acc);
    const int64_t full_depth = depth / block * block, full_width = width / block * block;
    for (int64_t m = 0; m < full_depth; m += block) {
      for (int64_t i = 0; i < full_width; i += block) {
        Vector<Acc, bytes> rows[block];
#pragma GCC unroll 16
        for (int64_t r = 0; r < block; ++r) {
          Acc values[block];
          for (int64_t q = 0; q < block; ++q) {
            values[q] = element(g[(m + r) * g_stride + i + q], h[(m + r) * h_stride + i + q]);
          }
          rows[r] = *reinterpret_cast<const Vector<Acc, bytes>*>(values);
        }
        transpose_registers<Acc, bytes, block / 2, Integer>(rows);
#pragma GCC unroll 16
        for (int64_t q = 0; q < block; ++q) {
          Operand* target = a + (i + q) * padded_depth + m;
          for (int64_t r = 0; r < block; ++r) {
            target[r] = cast<Operand, Acc>(rows[q][r]);
          }
        }
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t m = i < full_width ? full_depth : 0; m < depth; ++m) {
        a[i * padded_depth + m] = cast<Operand, Acc>(element(g[m * g_stride + i], h[m * h_stride + i]));
      }
      for (int64_t m = depth; m < padded_depth; ++m) {
        a[i * padded_depth + m] = Operand(0);
      }
    }
  }
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
    case Activation::Tanh:
      break;
  }
}

// The layout that bfloat16 tiles want: rows in pairs, interleaved (gemm_tile.h); an odd last row is
// paired with zeros. float32 is rounded to nearest even.
template <typename In>
struct InterleaveRows {
  [[gnu::always_inline]] static inline uint32_t bits(In x) {
    if constexpr (std::is_same_v<In, at::BFloat16>) {
      return x.x;
    } else {
      const uint32_t whole = __builtin_bit_cast(uint32_t, x);
      const uint32_t rounded = (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
      const bool is_nan = (whole & 0x7fffffff) > 0x7f800000;
      return is_nan ? 0x7fc0 : rounded;
    }
  }

  template <int bytes>
  [[gnu::always_inline]] static inline void run(const In* x, int64_t stride, int64_t depth, int64_t width,
                                                at::BFloat16* out) {
    for (int64_t m = 0; m < depth; m += 2) {
      const In* even = x + m * stride;
      using Pair [[gnu::may_alias]] = uint32_t;
      Pair* pairs = reinterpret_cast<Pair*>(out + m * width);
      if (m + 1 < depth) {
        const In* odd = even + stride;
        for (int64_t j = 0; j < width; ++j) {
          pairs[j] = bits(even[j]) | bits(odd[j]) << 16;
        }
      } else {
        for (int64_t j = 0; j < width; ++j) {
          pairs[j] = bits(even[j]);
        }
      }
    }
  }
};

}  // namespace growkernels::virtual_grad
