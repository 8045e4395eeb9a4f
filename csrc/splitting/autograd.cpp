// Derivatives, written in differentiable ops, so that they can be differentiated again. With gy the
// incoming gradient of y_i = S_i v_i, and per sample m the products p_i = x_m . v_i, q_i = x_m . gy_i:
//   gv_i = S_i gy_i        gw[m, i] = p_i q_i        gx_m = sum_i w[m, i] (q_i v_i + p_i gy_i),
// summed over the k vectors of a neuron where there are several. In the convolution, products with x are
// convolutions, and sums over i are their input gradients. Of w = g act''(z):
//   dL/dg = dL/dw act''(z)        dL/dz = dL/dw g act'''(z).

#include "splitting/dispatch.h"
#include "splitting/splitting.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace growkernels::splitting {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Weight : torch::autograd::Function<Weight> {
  static Variable forward(AutogradContext* ctx, const at::Tensor& grad, const at::Tensor& preact,
                          std::string activation, std::optional<double> beta) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad, preact});
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["beta"] = beta;
    return call_splitting_weight(grad, preact, activation, beta);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    const variable_list saved = ctx->get_saved_variables();
    const Curvature curvature =
        parse_activation(ctx->saved_data["activation"].toStringRef(), ctx->saved_data["beta"].toOptional<double>());
    Variable grad, preact;
    if (ctx->needs_input_grad(0)) {
      grad = incoming[0] * second_derivative(saved[1], curvature);
    }
    if (ctx->needs_input_grad(1)) {
      preact = incoming[0] * saved[0] * third_derivative(saved[1], curvature);
    }
    return {grad, preact, Variable(), Variable()};
  }
};

// [n, d] or [n, k, d] -> [n k, d]; the same for filters.
at::Tensor joined(const at::Tensor& v, int64_t neuron_dims) { return neuron_dims == 1 ? v : v.flatten(0, 1); }

// [M, n k] -> [M, n, k] or [N, n k, H, W] -> [N, n, k, H, W].
at::Tensor by_neuron(const at::Tensor& products, const at::Tensor& w) {
  c10::SymDimVector sizes(w.sym_sizes().begin(), w.sym_sizes().end());
  const c10::SymInt neurons = sizes[1], k = neurons == 0 ? c10::SymInt(1) : products.sym_size(1) / neurons;
  sizes.insert(sizes.begin() + 2, k);
  return products.view_symint(sizes);
}

// What the two products have in common; Map applies vectors to x, and Adjoint maps products back to x.
template <typename Map, typename Adjoint>
variable_list backward_of_products(AutogradContext* ctx, const at::Tensor& w, const at::Tensor& v,
                                   const at::Tensor& incoming, const Map& map, const Adjoint& adjoint) {
  Variable x_grad, w_grad;
  if (ctx->needs_input_grad(0) || ctx->needs_input_grad(1)) {
    const at::Tensor p = map(v), q = map(incoming);
    if (ctx->needs_input_grad(1)) {
      w_grad = by_neuron(p * q, w).sum(2);
    }
    if (ctx->needs_input_grad(0)) {
      const at::Tensor weights = w.unsqueeze(2);
      x_grad = adjoint((by_neuron(q, w) * weights).view_symint(q.sym_sizes()), v) +
               adjoint((by_neuron(p, w) * weights).view_symint(p.sym_sizes()), incoming);
    }
  }
  return {x_grad, w_grad};
}

struct Hvp : torch::autograd::Function<Hvp> {
  static Variable forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w, const at::Tensor& v) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, w, v});
    return call_splitting_hvp(x, w, v);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &w = saved[1], &v = saved[2], &y_grad = incoming[0];
    const int64_t neuron_dims = v.dim() - 1;
    variable_list out = backward_of_products(
        ctx, w, joined(v, neuron_dims), joined(y_grad, neuron_dims),
        [&](const at::Tensor& vectors) { return at::matmul(x, vectors.t()); },
        [](const at::Tensor& products, const at::Tensor& vectors) { return at::matmul(products, vectors); });
    out.push_back(ctx->needs_input_grad(2) ? call_splitting_hvp(x, w, y_grad) : Variable());
    return out;
  }
};

struct HvpConv2d : torch::autograd::Function<HvpConv2d> {
  static Variable forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w, const at::Tensor& v,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, w, v});
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    return call_splitting_hvp_conv2d(x, w, v, stride, padding, dilation);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &w = saved[1], &v = saved[2], &y_grad = incoming[0];
    const std::vector<int64_t> stride = ctx->saved_data["stride"].toIntVector(),
                               padding = ctx->saved_data["padding"].toIntVector(),
                               dilation = ctx->saved_data["dilation"].toIntVector();
    const int64_t neuron_dims = v.dim() - 3;
    variable_list out = backward_of_products(
        ctx, w, joined(v, neuron_dims), joined(y_grad, neuron_dims),
        [&](const at::Tensor& filters) { return at::conv2d(x, filters, {}, stride, padding, dilation); },
        [&](const at::Tensor& products, const at::Tensor& filters) {
          return std::get<0>(at::convolution_backward(products, x, filters, std::nullopt, stride, padding, dilation,
                                                      false, {0, 0}, 1, {true, false, false}));
        });
    out.push_back(ctx->needs_input_grad(2) ? call_splitting_hvp_conv2d(x, w, y_grad, stride, padding, dilation)
                                           : Variable());
    out.resize(6);
    return out;
  }
};

bool needs_gradient(std::initializer_list<at::Tensor> tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& x) { return x.requires_grad(); });
}

at::Tensor splitting_weight(const at::Tensor& grad, const at::Tensor& preact, c10::string_view activation,
                            std::optional<double> beta) {
  if (needs_gradient({grad, preact})) {
    return Weight::apply(grad, preact, std::string(activation), beta);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_splitting_weight(grad, preact, activation, beta);
}

at::Tensor splitting_hvp(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v) {
  if (needs_gradient({x, w, v})) {
    return Hvp::apply(x, w, v);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_splitting_hvp(x, w, v);
}

at::Tensor splitting_hvp_conv2d(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation) {
  if (needs_gradient({x, w, v})) {
    return HvpConv2d::apply(x, w, v, stride.vec(), padding.vec(), dilation.vec());
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_splitting_hvp_conv2d(x, w, v, stride, padding, dilation);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Autograd, m) {
  m.impl("splitting_weight", &splitting_weight);
  m.impl("splitting_hvp", &splitting_hvp);
  m.impl("splitting_hvp_conv2d", &splitting_hvp_conv2d);
}

}  // namespace growkernels::splitting
