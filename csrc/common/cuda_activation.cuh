#pragma once
// Activation functions in CUDA's dialect.

#include "common/activation.h"
#include "common/cuda_instructions.cuh"

namespace growkernels::cuda {

// 16-bit results are rounded to 8 or 11 bits, which the hardware's approximations are finer than: exp and
// 1 / x to 2^-21. tanh of bfloat16, whose small values keep their relative precision, has an instruction
// of its own (2^-11); for float16 the difference 1 - 2 / (1 + e^2x) is exact to float16's smallest number.
template <typename Element>
__device__ float tanh_of(float x) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    return approximate_tanh(x);
  } else if constexpr (std::is_same_v<Element, Half>) {
    return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x));
  } else {
    return tanhf(x);
  }
}

template <typename Element>
__device__ float sigmoid_of(float x) {
  if constexpr (std::is_same_v<Element, float>) {
    return 1.0f / (1.0f + expf(-x));
  } else {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  }
}

template <typename Element, Activation activation>
__device__ float activate(float x) {
  if constexpr (activation == Activation::Tanh) {
    return tanh_of<Element>(x);
  } else if constexpr (activation == Activation::Relu) {
    return x < 0.0f ? 0.0f : x;  // keeps NaN
  } else if constexpr (activation == Activation::Gelu) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f));
  } else if constexpr (activation == Activation::Silu) {
    return x * sigmoid_of<Element>(x);
  } else {
    return sigmoid_of<Element>(x);
  }
}

// f.operator()<activation>()
template <typename F>
__device__ void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::Tanh:
      return f.template operator()<Activation::Tanh>();
    case Activation::Relu:
      return f.template operator()<Activation::Relu>();
    case Activation::Gelu:
      return f.template operator()<Activation::Gelu>();
    case Activation::Silu:
      return f.template operator()<Activation::Silu>();
    case Activation::Sigmoid:
      return f.template operator()<Activation::Sigmoid>();
    default:
      return;
  }
}

}  // namespace growkernels::cuda
