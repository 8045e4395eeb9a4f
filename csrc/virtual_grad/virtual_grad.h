#pragma once
// What every implementation of the family shares: the kinds of virtual layers and the argument checks.

#include "common/op.h"
#include "virtual_grad/kind.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <vector>

namespace growkernels::virtual_grad {

// Throws one sentence when a name is unknown.
Kind parse_kind(std::string_view layer, std::string_view activation, double scale);

using Gradients = std::vector<at::Tensor>;

// The arguments of virtual_grads and virtual_grad_norms, and how torch passes them.
struct Positions {
  template <typename Result>
  using Signature = Result(at::TensorList, at::TensorList, c10::string_view, c10::string_view, double);

  at::TensorList inputs, grads;
  c10::string_view layer, activation;
  double scale;

  Kind kind() const { return parse_kind(layer, activation, scale); }
};

// Of accumulate_virtual_grads.
struct Accumulation : Positions {
  using Signature = at::Tensor(at::TensorList, at::TensorList, c10::string_view, c10::string_view, double,
                               at::TensorList, const std::optional<at::Tensor>&);

  at::TensorList sums;
  const std::optional<at::Tensor>& second_moments;
};

// Throw one sentence when lists, shapes, dtypes or devices do not fit. Work on symbolic shapes too.
void check_positions(const char* op, const Positions& positions, const Kind& kind);
void check_sums(const Accumulation& call, const Kind& kind);  // before anything is written

// The kernel's result for a call that has been checked.
template <Gradients (*kernel)(const Positions&, const Kind&)>
Gradients checked(const Positions& call) {
  const Kind kind = call.kind();
  check_positions("virtual_grads", call, kind);
  return kernel(call, kind);
}
template <at::Tensor (*kernel)(const Positions&, const Kind&)>
at::Tensor checked(const Positions& call) {
  const Kind kind = call.kind();
  check_positions("virtual_grad_norms", call, kind);
  return kernel(call, kind);
}
template <at::Tensor (*kernel)(const Accumulation&, const Kind&)>
at::Tensor checked(const Accumulation& call) {
  const Kind kind = call.kind();
  check_positions("virtual_grads", call, kind);
  check_sums(call, kind);
  return kernel(call, kind);
}

template <Gradients (*gradients)(const Positions&), at::Tensor (*norms)(const Positions&),
          at::Tensor (*accumulate)(const Accumulation&)>
void implement(torch::Library& m) {
  m.impl("virtual_grads", &Unpacked<Positions, Positions::Signature<Gradients>>::run<gradients>);
  m.impl("virtual_grad_norms", &Unpacked<Positions, Positions::Signature<at::Tensor>>::run<norms>);
  m.impl("accumulate_virtual_grads", &Unpacked<Accumulation>::run<accumulate>);
}

// [samples, width] with contiguous rows: a view where the strides allow it.
at::Tensor as_rows(const at::Tensor& x);

// dtype of G and of the norms: float32 for 16-bit inputs, else the inputs' own.
at::ScalarType gradient_dtype(at::ScalarType input);

// Shape of G at one position: [outputs, inputs], or [C, C, 3, 3] for a convolution.
c10::SymDimVector gradient_shape(const at::Tensor& input, const at::Tensor& grad, const Kind& kind);

// sigma(scale * x), of ATen's own functions.
at::Tensor activate(const at::Tensor& x, const Kind& kind);

// G at one position, composed of ATen's ops: for devices and dtypes without a kernel of their own.
at::Tensor aten_gradient(const at::Tensor& h, const at::Tensor& g, const Kind& kind);

// Why the CUDA kernels do not compute a call; null where they do.
const char* cuda_obstacle(at::ScalarType dtype, const Kind& kind);

// The family composed of ATen's ops and of gradients at single positions, one after the other.
using GradientAt = at::Tensor(const at::Tensor& h, const at::Tensor& g, const Kind& kind);
Gradients gradients_one_by_one(const Positions& call, const Kind& kind, GradientAt gradient_at);
at::Tensor norms_one_by_one(const Positions& call, const Kind& kind, GradientAt gradient_at);
at::Tensor accumulate_one_by_one(const Accumulation& call, const Kind& kind, GradientAt gradient_at);
// The same of aten_gradient.
Gradients aten_gradients(const Positions& call, const Kind& kind);
at::Tensor aten_gradient_norms(const Positions& call, const Kind& kind);
at::Tensor aten_accumulate(const Accumulation& call, const Kind& kind);

}  // namespace growkernels::virtual_grad
