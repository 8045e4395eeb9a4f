#pragma once
// What every implementation of the family shares: shapes, activation functions and the argument checks.

#include "common/activation.h"
#include "common/op.h"
#include "common/whole_rows.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

namespace growkernels::splitting {

// An activation function as splitting_weight takes it: ReLU has become the softplus it is treated as.
struct Curvature {
  Activation activation;
  double beta;  // of Softplus
};

// Throws one sentence when the name is unknown or its beta is missing, not wanted or not positive.
Curvature parse_curvature(std::string_view activation, std::optional<double> beta);

// How the filters move over the images.
struct Sliding {
  std::array<int64_t, 2> stride, padding, dilation;
};

// Throws one sentence unless each is one pair of numbers that a convolution can have.
Sliding parse_sliding(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);

// The ops' arguments, and how torch passes them.
struct Weight {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, c10::string_view, std::optional<double>);

  const at::Tensor &grad, &preact;
  c10::string_view activation;
  std::optional<double> beta;
};

struct Hvp {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool);

  const at::Tensor &x, &w, &v;
  bool full_precision = false;
};

struct HvpConv2d {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef,
                               at::IntArrayRef, at::IntArrayRef);

  const at::Tensor &x, &w, &v;
  at::IntArrayRef stride, padding, dilation;
};

// Throw one sentence when shapes, dtypes or devices do not fit. They work on symbolic shapes too.
void check_weight(const Weight& call);
void check_hvp(const Hvp& call);
void check_hvp_conv2d(const HvpConv2d& call, const Sliding& sliding);

// The kernel's result for a call that has been checked.
template <at::Tensor (*kernel)(const Weight&, const Curvature&)>
at::Tensor checked(const Weight& call) {
  const Curvature curvature = parse_curvature(call.activation, call.beta);
  check_weight(call);
  return kernel(call, curvature);
}
template <at::Tensor (*kernel)(const Hvp&)>
at::Tensor checked(const Hvp& call) {
  check_hvp(call);
  return kernel(call);
}
template <at::Tensor (*kernel)(const HvpConv2d&, const Sliding&)>
at::Tensor checked(const HvpConv2d& call) {
  const Sliding sliding = parse_sliding(call.stride, call.padding, call.dilation);
  check_hvp_conv2d(call, sliding);
  return kernel(call, sliding);
}

// Registers kernels for the three ops of this form: see ops.cpp.
template <at::Tensor (*weight)(const Weight&), at::Tensor (*hvp)(const Hvp&),
          at::Tensor (*hvp_conv2d)(const HvpConv2d&)>
void implement(torch::Library& m, const std::string& form = "") {
  m.impl(("splitting_weight" + form).c_str(), &Unpacked<Weight>::run<weight>);
  m.impl(("splitting_hvp" + form).c_str(), &Unpacked<Hvp>::run<hvp>);
  m.impl(("splitting_hvp_conv2d" + form).c_str(), &Unpacked<HvpConv2d>::run<hvp_conv2d>);
}

// The family composed of ATen's ops, differentiable in every way that those are.
at::Tensor composed_weight(const Weight& call, const Curvature& curvature);
at::Tensor composed_hvp(const Hvp& call);
at::Tensor composed_hvp_conv2d(const HvpConv2d& call, const Sliding& sliding);

// Products of rows and vectors exceed float16 before the weights bring them back: they are taken in float32.
inline at::Tensor wide(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf ? tensor.to(at::kFloat) : whole_rows(tensor);
}

}  // namespace growkernels::splitting
