#pragma once
// What every implementation of the family shares: shapes, activation functions and the argument checks.

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>

namespace growkernels::splitting {

enum class Activation { Gelu, GeluTanh, Silu, Tanh, Sigmoid, Softplus };

// An activation function as splitting_weight takes it: ReLU has become the softplus it is treated as.
struct Curvature {
  Activation activation;
  double beta;  // of Softplus
};

// Throws one sentence when the name is unknown or its beta is missing, not wanted or not positive.
Curvature parse_activation(std::string_view activation, std::optional<double> beta);

// How the filters move over the images.
struct Sliding {
  std::array<int64_t, 2> stride, padding, dilation;
};

// Throws one sentence unless each is one pair of numbers that a convolution can have.
Sliding parse_sliding(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);

// Throw one sentence when shapes, dtypes or devices do not fit. They work on symbolic shapes too.
void check_weight(const at::Tensor& grad, const at::Tensor& preact);
void check_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v);
void check_hvp_conv2d(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v, const Sliding& sliding);

// The family composed of ATen's ops, differentiable in every way that those are.
at::Tensor composed_weight(const at::Tensor& grad, const at::Tensor& preact, c10::string_view activation,
                           std::optional<double> beta);
at::Tensor composed_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v);
at::Tensor composed_hvp_conv2d(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation);

// act'' and act''' of ATen's differentiable ops.
at::Tensor second_derivative(const at::Tensor& preact, const Curvature& curvature);
at::Tensor third_derivative(const at::Tensor& preact, const Curvature& curvature);

}  // namespace growkernels::splitting
