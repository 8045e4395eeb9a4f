#include "virtual_grad/virtual_grad.h"

#include "common/activation_torch.h"

#include <ATen/TensorOperators.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace growkernels::virtual_grad {

Kind parse_kind(std::string_view layer, std::string_view activation, double scale) {
  Kind kind{};
  if (layer == "linear_relu") {
    kind.layer = Layer::LinearRelu;
  } else if (layer == "residual") {
    kind.layer = Layer::Residual;
  } else if (layer == "conv2d_relu") {
    kind.layer = Layer::Conv2dRelu;
  } else if (layer == "linear") {
    kind.layer = Layer::Linear;
  } else {
    TORCH_CHECK_VALUE(false, "virtual_grad: unknown layer '", layer,
                      "'; use 'linear_relu', 'residual', 'conv2d_relu' or 'linear'");
  }
  using enum Activation;
  kind.activation = parse_activation("virtual_grad", activation, {Tanh, Relu, Gelu, Silu, Sigmoid});
  TORCH_CHECK_VALUE(std::isfinite(scale), "virtual_grad: scale must be finite, got ", scale);
  kind.scale = scale;
  return kind;
}

namespace {

// All sizes but the last.
bool same_samples(const at::Tensor& h, const at::Tensor& g) {
  return h.dim() == g.dim() && h.sym_sizes().slice(0, h.dim() - 1) == g.sym_sizes().slice(0, g.dim() - 1);
}

}  // namespace

void check_positions(const char* op, const Positions& positions, const Kind& kind) {
  const at::TensorList inputs = positions.inputs, grads = positions.grads;
  TORCH_CHECK_VALUE(!inputs.empty(), op, ": the list of inputs is empty; pass one activation per position");
  TORCH_CHECK_VALUE(inputs.size() == grads.size(), op, ": got ", inputs.size(), " inputs but ", grads.size(),
                    " grads; pass one gradient per input");
  const at::Tensor& first = inputs[0];
  for (size_t l = 0; l < inputs.size(); ++l) {
    const at::Tensor &h = inputs[l], &g = grads[l];
    TORCH_CHECK_TYPE(at::isFloatingType(h.scalar_type()) && h.element_size() >= 2, op, ": inputs[", l, "] has dtype ",
                     h.scalar_type(), "; pass float16, bfloat16, float32 or float64");
    TORCH_CHECK_TYPE(h.scalar_type() == first.scalar_type(), op, ": inputs[", l, "] has dtype ", h.scalar_type(),
                     " but inputs[0] has ", first.scalar_type(), "; cast all positions to one dtype");
    TORCH_CHECK_TYPE(g.scalar_type() == first.scalar_type(), op, ": grads[", l, "] has dtype ", g.scalar_type(),
                     " but inputs[0] has ", first.scalar_type(), "; cast all positions to one dtype");
    TORCH_CHECK_VALUE(h.device() == first.device(), op, ": inputs[", l, "] is on ", h.device(), " but inputs[0] is on ",
                      first.device(), "; move all positions to one device");
    TORCH_CHECK_VALUE(g.device() == first.device(), op, ": grads[", l, "] is on ", g.device(), " but inputs[0] is on ",
                      first.device(), "; move all positions to one device");
    if (kind.layer == Layer::Linear) {
      TORCH_CHECK_VALUE(h.dim() >= 2 && same_samples(h, g), op, ": inputs[", l, "] has shape ", h.sym_sizes(),
                        " but grads[", l, "] has shape ", g.sym_sizes(),
                        "; a 'linear' position needs [..., features] with the same leading dimensions, at least one");
      continue;
    }
    TORCH_CHECK_VALUE(h.sym_sizes() == g.sym_sizes(), op, ": inputs[", l, "] has shape ", h.sym_sizes(), " but grads[",
                      l, "] has shape ", g.sym_sizes(), "; they must be equal");
    if (kind.layer == Layer::Conv2dRelu) {
      TORCH_CHECK_VALUE(h.dim() == 4, op, ": inputs[", l, "] has shape ", h.sym_sizes(),
                        "; a convolution position needs [N, C, H, W]");
    } else {
      TORCH_CHECK_VALUE(h.dim() >= 2, op, ": inputs[", l, "] has shape ", h.sym_sizes(),
                        "; a linear position needs [..., features] with at least one leading dimension");
    }
  }
}

namespace {

void check_writable(const at::Tensor& buffer, const std::string& name) {
  TORCH_CHECK_VALUE(!buffer.is_inference() || c10::InferenceMode::is_enabled(), "virtual_grads: ", name,
                    " was made in inference mode and cannot be changed outside it; pass a clone");
}

// The bytes from the first to the last element.
struct Span {
  uintptr_t begin, end;
  bool operator<(const Span& other) const { return begin < other.begin; }
};

std::optional<Span> span_of(const at::Tensor& tensor) {
  if (tensor.is_meta() || tensor.numel() == 0) {
    return std::nullopt;
  }
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return Span{begin, begin + static_cast<uintptr_t>((last + 1) * tensor.element_size())};
}

// Throws one sentence when a buffer shares memory with another one or with an argument that is read.
void check_separate(const Accumulation& call) {
  std::vector<Span> written;
  const auto add = [&](const at::Tensor& tensor) {
    if (const std::optional<Span> span = span_of(tensor)) {
      written.push_back(*span);
    }
  };
  std::for_each(call.sums.begin(), call.sums.end(), add);
  if (call.second_moments.has_value()) {
    add(*call.second_moments);
  }
  std::sort(written.begin(), written.end());
  for (size_t i = 1; i < written.size(); ++i) {
    TORCH_CHECK_VALUE(written[i - 1].end <= written[i].begin,
                      "virtual_grads: two of the buffers to accumulate into share memory; pass one of its own "
                      "for every position, and for the second moments, and add those of tied layers afterwards");
  }
  const auto check = [&](const char* name, at::TensorList read) {
    for (size_t l = 0; l < read.size(); ++l) {
      const std::optional<Span> span = span_of(read[l]);
      if (!span.has_value()) {
        continue;
      }
      const auto after = std::upper_bound(written.begin(), written.end(), *span);
      const bool apart = (after == written.end() || span->end <= after->begin) &&
                         (after == written.begin() || (after - 1)->end <= span->begin);
      TORCH_CHECK_VALUE(apart, "virtual_grads: a buffer to accumulate into shares memory with ", name, "[", l,
                        "]; pass a buffer of its own");
    }
  };
  check("inputs", call.inputs);
  check("grads", call.grads);
}

}  // namespace

void check_sums(const Accumulation& call, const Kind& kind) {
  const at::TensorList inputs = call.inputs, sums = call.sums;
  const std::optional<at::Tensor>& second_moments = call.second_moments;
  constexpr const char* op = "virtual_grads";
  const at::ScalarType dtype = gradient_dtype(inputs[0].scalar_type());
  TORCH_CHECK_VALUE(sums.size() == inputs.size(), op, ": got ", sums.size(), " buffers to accumulate into for ",
                    inputs.size(), " inputs; pass one per position");
  for (size_t l = 0; l < sums.size(); ++l) {
    const at::Tensor& sum = sums[l];
    const c10::SymDimVector shape = gradient_shape(inputs[l], call.grads[l], kind);
    TORCH_CHECK_VALUE(sum.sym_sizes() == c10::SymIntArrayRef(shape), op, ": buffer ", l, " has shape ", sum.sym_sizes(),
                      "; the gradient of this position has shape ", c10::SymIntArrayRef(shape));
    TORCH_CHECK_TYPE(sum.scalar_type() == dtype, op, ": buffer ", l, " has dtype ", sum.scalar_type(),
                     "; gradients of ", inputs[0].scalar_type(), " inputs are accumulated in ", dtype);
    TORCH_CHECK_VALUE(sum.device() == inputs[0].device(), op, ": buffer ", l, " is on ", sum.device(),
                      " but the inputs are on ", inputs[0].device(), "; move it there");
    TORCH_CHECK_VALUE(sum.is_contiguous(), op, ": buffer ", l, " is not contiguous; pass a contiguous one");
    check_writable(sum, "buffer " + std::to_string(l));
    TORCH_CHECK_VALUE(!sum.requires_grad(), op, ": buffer ", l,
                      " requires grad; accumulation is not differentiable, pass a plain buffer");
  }
  if (second_moments.has_value()) {
    TORCH_CHECK_VALUE(second_moments->dim() == 1 && second_moments->sym_size(0) == inputs.size(), op,
                      ": second_moments has shape ", second_moments->sym_sizes(), "; it needs one entry for each of ",
                      inputs.size(), " positions");
    TORCH_CHECK_TYPE(second_moments->scalar_type() == dtype, op, ": second_moments has dtype ",
                     second_moments->scalar_type(), "; it needs ", dtype);
    TORCH_CHECK_VALUE(second_moments->device() == inputs[0].device(), op, ": second_moments is on ",
                      second_moments->device(), " but the inputs are on ", inputs[0].device(), "; move it there");
    check_writable(*second_moments, "second_moments");
    TORCH_CHECK_VALUE(inputs.size() == 1 || second_moments->sym_stride(0) != 0, op,
                      ": second_moments is an expanded tensor, whose entries share memory; pass one that is not");
    TORCH_CHECK_VALUE(!second_moments->requires_grad(), op,
                      ": second_moments requires grad; accumulation is not differentiable, pass a plain buffer");
  }
  check_separate(call);
}

at::Tensor as_rows(const at::Tensor& x) {
  const at::Tensor rows = x.dim() == 2 ? x : x.flatten(0, -2);
  const bool usable = (rows.size(1) <= 1 || rows.stride(1) == 1) && rows.stride(0) >= rows.size(1);
  return usable ? rows : rows.contiguous();
}

at::ScalarType gradient_dtype(at::ScalarType input) { return input == at::kDouble ? at::kDouble : at::kFloat; }

c10::SymDimVector gradient_shape(const at::Tensor& input, const at::Tensor& grad, const Kind& kind) {
  if (kind.layer == Layer::Conv2dRelu) {
    return {input.sym_size(1), input.sym_size(1), 3, 3};
  }
  return {grad.sym_size(-1), input.sym_size(-1)};
}

at::Tensor activate(const at::Tensor& x, const Kind& kind) {
  return growkernels::activate(kind.scale == 1.0 ? x : x * kind.scale, kind.activation);
}

}  // namespace growkernels::virtual_grad
