// First derivatives of the family by its backward op, second ones by differentiable ATen ops. Let
//   dz = mixT(g)             the gradient of the maps z, with g the gradient of y (see maps_gradient)
//   dx = convT(dz, basis), dbasis = wgrad(x, dz), dcoeff = sum g_mixed z', dbias = sum g
// and v be gradients of those four. Then, with u = conv(vx, basis) + conv(x, vbasis):
//   of g: mix(u) + [0; vcoeff z] + vbias        of x: convT(dz, vbasis)        of basis: wgrad(vx, dz)
//   of coeff: sum g_mixed u'                    of z: vcoeff' g_mixed

#include "basis_conv/basis_conv.h"
#include "common/autograd_node.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace growkernels::basis_conv {
namespace {

using torch::autograd::collect_next_edges;
using torch::autograd::compute_requires_grad;
using torch::autograd::isFwGradDefined;
using torch::autograd::SavedVariable;
using torch::autograd::set_history;
using torch::autograd::variable_list;

// A Form that lives as long as the node of the graph.
struct SavedForm {
  std::vector<c10::SymInt> stride, padding, dilation;
  bool include_basis = true;

  SavedForm() = default;
  explicit SavedForm(const Form& form)
      : stride(form.stride.vec()),
        padding(form.padding.vec()),
        dilation(form.dilation.vec()),
        include_basis(form.include_basis) {}
  Form get() const { return {stride, padding, dilation, include_basis}; }
};

at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const Form& form) {
  return at::conv2d_symint(x, weight, std::nullopt, form.stride, form.padding, form.dilation);
}

// Gradients of convolution(x, weight) for x and for the weight.
std::tuple<at::Tensor, at::Tensor> convolution_gradients(const at::Tensor& grad, const at::Tensor& x,
                                                         const at::Tensor& weight, const Form& form, bool x_wanted,
                                                         bool weight_wanted) {
  const std::array<c10::SymInt, 2> no_output_padding = {0, 0};
  const auto [dx, dweight, unused] =
      at::convolution_backward_symint(grad, x, weight, std::nullopt, form.stride, form.padding, form.dilation, false,
                                      no_output_padding, 1, {x_wanted, weight_wanted, false});
  return {dx, dweight};
}

// Differentiates basis_conv2d_backward, whose inputs are grad, x, basis, coeff, z and z_bias.
struct BasisConv2dBackwardBackward final : torch::autograd::Node {
  SavedVariable grad, x, basis, coeff, z, z_bias;
  SavedForm form;

  std::string name() const override { return "BasisConv2dBackwardBackward"; }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Form f = form.get();
    const at::Tensor g = grad.unpack(), image = x.unpack(), filters = basis.unpack(), mixing = coeff.unpack();
    const at::Tensor &vx = incoming[0], &vbasis = incoming[1], &vcoeff = incoming[2], &vbias = incoming[3];
    const bool has_mix = mixing.sym_size(0) != 0;
    const at::Tensor g_mixed = mixed_channels(g, mixing);
    const at::Tensor u = sum_of(vx.defined() ? convolution(vx, filters, f) : at::Tensor(),
                                vbasis.defined() ? convolution(image, vbasis, f) : at::Tensor());
    variable_list out(6);
    if (task_should_compute_output(0)) {
      out[0] = gradient_of_grad(g, mixing, u, vcoeff, vbias, f);
    }
    if ((vx.defined() || vbasis.defined()) && (task_should_compute_output(1) || task_should_compute_output(2))) {
      const at::Tensor dz = maps_gradient(g, mixing, f);
      if (vbasis.defined() && task_should_compute_output(1)) {
        out[1] = std::get<0>(convolution_gradients(dz, image, vbasis, f, true, false));
      }
      if (vx.defined() && task_should_compute_output(2)) {
        out[2] = std::get<1>(convolution_gradients(dz, vx, filters, f, false, true));
      }
    }
    if (u.defined() && task_should_compute_output(3)) {
      out[3] = channel_products(g_mixed, u);
    }
    if (vcoeff.defined() && has_mix) {
      const at::Tensor of_z = mix(vcoeff.t(), g_mixed);
      if (task_should_compute_output(4)) {
        out[4] = of_z;
      }
      if (task_should_compute_output(5)) {
        out[5] = -of_z.sum({0, 2, 3});
      }
    }
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&grad, &x, &basis, &coeff, &z, &z_bias}) {
      variable->reset_data();
    }
  }

 private:
  at::Tensor gradient_of_grad(const at::Tensor& g, const at::Tensor& mixing, const at::Tensor& u,
                              const at::Tensor& vcoeff, const at::Tensor& vbias, const Form& f) const {
    at::Tensor result, mixed;
    if (mixing.sym_size(0) != 0) {
      at::Tensor maps = vcoeff.defined() ? z.unpack() : at::Tensor();
      if (const at::Tensor offset = z_bias.unpack(); maps.defined() && offset.defined()) {
        maps = maps - offset.unsqueeze(-1).unsqueeze(-1);
      }
      mixed = sum_of(u.defined() ? mix(mixing, u) : at::Tensor(), maps.defined() ? mix(vcoeff, maps) : at::Tensor());
    }
    if (!f.include_basis) {
      result = mixed;
    } else if (u.defined() || mixed.defined()) {
      const at::Tensor direct = u.defined() ? u : at::zeros_like(g.narrow_symint(1, 0, mixing.sym_size(1)));
      result = mixed.defined() ? at::cat({direct, mixed}, 1) : direct;
    }
    if (!vbias.defined()) {
      return result;
    }
    return sum_of(result, vbias.unsqueeze(-1).unsqueeze(-1).expand_symint(g.sym_sizes()));
  }
};

Gradients call_backward(const Backward& call) {
  static const auto op = registered_op<Backward::Signature>("growkernels::basis_conv2d_backward");
  const auto& [grad, x, basis, coeff, z, z_bias, form, wanted] = call;
  return op.call(grad, x, basis, coeff, z, z_bias, form.stride, form.padding, form.dilation, form.include_basis,
                 wanted);
}

// Differentiates basis_conv2d (one output) and basis_conv2d_with_maps (two).
struct BasisConv2dBackward final : torch::autograd::Node {
  SavedVariable x, basis, coeff, bias;
  SavedVariable maps;               // the output that holds them: y with include_basis, else z
  c10::VariableVersion output_now;  // shared with that output
  uint32_t output_then = 0;
  SavedForm form;

  std::string name() const override { return "BasisConv2dBackward"; }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Form f = form.get();
    const at::Tensor image = x.unpack(), filters = basis.unpack(), mixing = coeff.unpack();
    const Mask wanted = {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2),
                         task_should_compute_output(3)};
    variable_list out(4);
    if (incoming[0].defined()) {
      const auto [z, z_bias] = saved_maps(image, filters, mixing, f);
      std::tie(out[0], out[1], out[2], out[3]) =
          call_backward({incoming[0], image, filters, mixing, z, z_bias, f, wanted});
    }
    if (incoming.size() == 2 && incoming[1].defined() && (wanted[0] || wanted[1])) {
      const auto [dx, dbasis] = convolution_gradients(incoming[1], image, filters, f, wanted[0], wanted[1]);
      out[0] = sum_of(out[0], dx);
      out[1] = sum_of(out[1], dbasis);
    }
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&x, &basis, &coeff, &bias, &maps}) {
      variable->reset_data();
    }
  }

 private:
  // By the op itself, with nothing mixed.
  static at::Tensor maps_alone(const at::Tensor& image, const at::Tensor& filters, const at::Tensor& mixing,
                               const Form& f) {
    static const auto op = registered_op<Forward::Signature<at::Tensor>>("growkernels::basis_conv2d");
    const at::Tensor none = mixing.narrow_symint(0, 0, 0);
    return op.call(image, filters, none, std::nullopt, f.stride, f.padding, f.dilation, true);
  }

  // The maps and the bias they contain. A convolution may be followed by an operation in place, such as
  // ReLU(inplace=True): where the output was overwritten, the maps are computed once more. So they are where a
  // bias may have cost their digits: the CPU's kernel looks (cpu.cpp), but other devices would have to be waited
  // for, and second derivatives would contain the same maps.
  std::tuple<at::Tensor, OptionalTensor> saved_maps(const at::Tensor& image, const at::Tensor& filters,
                                                    const at::Tensor& mixing, const Form& f) {
    const at::Tensor full_bias = bias.unpack();
    const bool digits_may_lack = full_bias.defined() && (!image.is_cpu() || at::GradMode::is_enabled());
    if (output_now.current_version() != output_then || digits_may_lack) {
      const bool own = image.is_cpu() && !at::GradMode::is_enabled();
      return {own ? maps_alone(image, filters, mixing, f) : convolution(image, filters, f), std::nullopt};
    }
    const at::Tensor saved = maps.unpack(getptr());
    if (!f.include_basis) {
      return {saved, std::nullopt};
    }
    const c10::SymInt count = filters.sym_size(0);
    return {saved.narrow_symint(1, 0, count),
            full_bias.defined() ? OptionalTensor(full_bias.narrow_symint(0, 0, count)) : std::nullopt};
  }
};

NewNode<BasisConv2dBackward> new_node(const Forward& call) {
  const auto& [x, basis, coeff, bias, form] = call;
  auto made = make_node<BasisConv2dBackward>(collect_next_edges(x, basis, coeff, bias));
  made.node->x = SavedVariable(x, false);
  made.node->basis = SavedVariable(basis, false);
  made.node->coeff = SavedVariable(coeff, false);
  if (form.include_basis) {
    made.node->bias = SavedVariable(bias, false);
  }
  made.node->form = SavedForm(form);
  return made;
}

void save_output(BasisConv2dBackward& node, const at::Tensor& output) {
  node.maps = SavedVariable(output, true);
  node.output_now = torch::autograd::impl::version_counter(output);
  node.output_then = node.output_now.current_version();
}

template <typename Result>
Result call_below(const c10::TypedOperatorHandle<Forward::Signature<Result>>& op, const Forward& call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Form& form = call.form;
  return op.call(call.x, call.basis, call.coeff, call.bias, form.stride, form.padding, form.dilation,
                 form.include_basis);
}

bool has_tangents(const Forward& call) {
  return isFwGradDefined(call.x) || isFwGradDefined(call.basis) || isFwGradDefined(call.coeff) ||
         isFwGradDefined(call.bias);
}

bool differentiable(const Forward& call) { return compute_requires_grad(call.x, call.basis, call.coeff, call.bias); }

WithMaps with_maps(const Forward& call) {
  static const auto op = registered_op<Forward::Signature<WithMaps>>("growkernels::basis_conv2d_with_maps");
  if (has_tangents(call)) {
    return checked<two_convolutions_with_maps>(call);
  }
  auto [y, z] = call_below(op, call);
  if (differentiable(call)) {
    const auto [node, pointer] = new_node(call);
    set_history(y, pointer);
    set_history(z, pointer);
    save_output(*node, z);
  }
  return {y, z};
}

at::Tensor with_maps_left_out(const Forward& call) { return std::get<0>(with_maps(call)); }

at::Tensor forward(const Forward& call) {
  static const auto op = registered_op<Forward::Signature<at::Tensor>>("growkernels::basis_conv2d");
  if (has_tangents(call)) {
    return checked<two_convolutions>(call);
  }
  const bool recorded = differentiable(call);
  if (recorded && !call.form.include_basis) {
    return checked<with_maps_left_out>(call);
  }
  at::Tensor y = call_below(op, call);
  if (recorded) {
    const auto [node, pointer] = new_node(call);
    set_history(y, pointer);
    save_output(*node, y);
  }
  return y;
}

Gradients backward(const Backward& call) {
  const auto& [grad, x, basis, coeff, z, z_bias, form, wanted] = call;
  if (isFwGradDefined(grad) || isFwGradDefined(x) || isFwGradDefined(basis) || isFwGradDefined(coeff) ||
      isFwGradDefined(z) || isFwGradDefined(z_bias)) {
    return checked<backward_by_two_convolutions>(call);
  }
  const bool differentiable = compute_requires_grad(grad, x, basis, coeff, z, z_bias);
  Gradients gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(call);
  }();
  if (differentiable) {
    const auto [node, pointer] =
        make_node<BasisConv2dBackwardBackward>(collect_next_edges(grad, x, basis, coeff, z, z_bias));
    node->grad = SavedVariable(grad, false);
    node->x = SavedVariable(x, false);
    node->basis = SavedVariable(basis, false);
    node->coeff = SavedVariable(coeff, false);
    node->z = SavedVariable(z, false);
    node->z_bias = SavedVariable(z_bias, false);
    node->form = SavedForm(form);
    std::apply([&](const auto&... gradient) { (set_history(gradient, pointer), ...); }, gradients);
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Autograd, m) { implement<forward, with_maps, backward>(m); }

}  // namespace growkernels::basis_conv
