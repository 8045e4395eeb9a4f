#pragma once
// Activation functions and their derivatives of ATen's differentiable ops.

#include "common/activation.h"

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <string_view>

namespace growkernels {

// The activation of this name; throws one sentence unless it is among `known`.
Activation parse_activation(const char* op, std::string_view name, std::initializer_list<Activation> known);

// act(z) and act'(z), in the dtype of z, of all but Softplus and GeluTanh.
at::Tensor activate(const at::Tensor& z, Activation activation);
at::Tensor first_derivative(const at::Tensor& z, Activation activation);

// act''(z) and act'''(z) of all but Relu, in float32 where z has 16 bits. `beta` belongs to Softplus.
at::Tensor second_derivative(const at::Tensor& z, Activation activation, double beta);
at::Tensor third_derivative(const at::Tensor& z, Activation activation, double beta);

}  // namespace growkernels
