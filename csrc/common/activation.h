#pragma once
// The activation functions. What each of them is stands in one entry a language: activation_torch.cpp has them of
// ATen's ops, activation_vector.h in the CPU's registers, cuda_activation.cuh in CUDA's dialect.

#include <array>

namespace growkernels {

enum class Activation { Tanh, Relu, Gelu, Silu, Sigmoid, GeluTanh, Softplus };

// In the order of their values.
inline constexpr std::array activation_names = {"tanh", "relu", "gelu", "silu", "sigmoid", "gelu_tanh", "softplus"};

// f.operator()<activation>() for the one of these that it is; false where it is none of them.
template <Activation first, Activation... others, typename F>
constexpr bool with_activation(Activation activation, const F& f) {
  if (activation == first) {
    f.template operator()<first>();
    return true;
  }
  if constexpr (sizeof...(others) > 0) {
    return with_activation<others...>(activation, f);
  }
  return false;
}

}  // namespace growkernels
