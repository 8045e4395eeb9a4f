// The argument checks, shapes and layouts of the family.

#include "basis_conv/basis_conv.h"

namespace growkernels::basis_conv {
namespace {

// Of an image, a kernel and their distances, so that no sum of products of two overflows.
constexpr int64_t largest_size = (int64_t{1} << 31) - 1;

// Sizes that are traced stay as they are: a limit would become a guard.
bool at_most_largest(const c10::SymInt& size) { return size.maybe_as_int().value_or(0) <= largest_size; }

constexpr const char* backward_op = "basis_conv2d_backward";

void check_tensor(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " has dtype ", tensor.scalar_type(),
                   " but x has ", x.scalar_type(), "; cast them to one dtype");
  TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", name, " is on ", tensor.device(), " but x is on ",
                    x.device(), "; move them to one device");
}

void check_pair(const char* op, const char* name, c10::SymIntArrayRef values, int64_t smallest) {
  TORCH_CHECK_VALUE(values.size() == 2, op, ": ", name, " has ", values.size(),
                    " entries; pass an int or one entry for each of height and width");
  for (const c10::SymInt& value : values) {
    TORCH_CHECK_VALUE(value >= smallest && value <= largest_size, op, ": ", name, " is ", values,
                      "; it must be at least ", smallest, " and at most ", largest_size);
  }
}

c10::SymInt output_size(const c10::SymInt& input, const c10::SymInt& kernel, const Form& form, size_t axis) {
  const c10::SymInt span = input + 2 * form.padding[axis] - form.dilation[axis] * (kernel - 1) - 1;
  return span < 0 ? c10::SymInt(0) : span / form.stride[axis] + 1;
}

c10::SymInt output_channels(const at::Tensor& basis, const at::Tensor& coeff, const Form& form) {
  return form.include_basis ? basis.sym_size(0) + coeff.sym_size(0) : coeff.sym_size(0);
}

}  // namespace

void check_forward(const char* op, const Forward& call) {
  const auto& [x, basis, coeff, bias, form] = call;
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()) && x.element_size() >= 2, op, ": x has dtype ", x.scalar_type(),
                   "; pass float16, bfloat16, float32 or float64");
  check_tensor(op, "basis", basis, x);
  check_tensor(op, "coeff", coeff, x);
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x has shape ", x.sym_sizes(), "; it needs [N, Cin, H, W]");
  TORCH_CHECK_VALUE(basis.dim() == 4, op, ": basis has shape ", basis.sym_sizes(), "; it needs [R, Cin, kh, kw]");
  TORCH_CHECK_VALUE(basis.sym_size(0) >= 1, op, ": basis has shape ", basis.sym_sizes(),
                    "; it needs at least one filter");
  TORCH_CHECK_VALUE(basis.sym_size(1) == x.sym_size(1), op, ": basis has ", basis.sym_size(1),
                    " input channels but x has ", x.sym_size(1),
                    "; they must be equal, since grouped convolutions are not supported");
  TORCH_CHECK_VALUE(x.sym_size(1) >= 1 && x.sym_size(2) >= 1 && x.sym_size(3) >= 1, op, ": x has shape ", x.sym_sizes(),
                    "; only the batch may be empty");
  TORCH_CHECK_VALUE(basis.sym_size(2) >= 1 && basis.sym_size(3) >= 1, op, ": basis has shape ", basis.sym_sizes(),
                    "; the kernel's height and width must be at least 1");
  for (const auto axis : {2, 3}) {
    TORCH_CHECK_VALUE(at_most_largest(x.sym_size(axis)) && at_most_largest(basis.sym_size(axis)), op, ": x has shape ",
                      x.sym_sizes(), " and basis ", basis.sym_sizes(), "; a side may have at most ", largest_size,
                      " pixels");
  }
  TORCH_CHECK_VALUE(coeff.dim() == 2 && coeff.sym_size(1) == basis.sym_size(0), op, ": coeff has shape ",
                    coeff.sym_sizes(), " but the basis has ", basis.sym_size(0), " filters; it needs ",
                    form.include_basis ? "[Cout - R, R]" : "[Cout, R]", " with R = ", basis.sym_size(0));
  TORCH_CHECK_VALUE(form.include_basis || coeff.sym_size(0) >= basis.sym_size(0), op, ": ", basis.sym_size(0),
                    " basis filters for ", coeff.sym_size(0),
                    " output channels; there may not be more filters than channels");
  if (bias.has_value()) {
    check_tensor(op, "bias", *bias, x);
    const c10::SymInt channels = output_channels(basis, coeff, form);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == channels, op, ": bias has shape ", bias->sym_sizes(),
                      "; it needs one entry for each of ", channels, " output channels");
  }
  check_pair(op, "stride", form.stride, 1);
  check_pair(op, "padding", form.padding, 0);
  check_pair(op, "dilation", form.dilation, 1);
  const c10::SymDimVector maps = maps_shape(x, basis, form);
  TORCH_CHECK_VALUE(maps[2] >= 1 && maps[3] >= 1, op, ": x of ", x.sym_size(2), " x ", x.sym_size(3),
                    " pixels with padding ", form.padding, " is smaller than the kernel of ", basis.sym_size(2), " x ",
                    basis.sym_size(3), " with dilation ", form.dilation, "; the output would be empty");
}

void check_with_maps(const Forward& call) {
  constexpr const char* op = "basis_conv2d_with_maps";
  TORCH_CHECK_VALUE(!call.form.include_basis, op,
                    ": with include_basis the maps are the first channels of the output; call basis_conv2d");
  check_forward(op, call);
}

void check_backward(const Backward& call) {
  const auto& [grad, x, basis, coeff, z, z_bias, form, wanted] = call;
  check_forward(backward_op, {x, basis, coeff, std::nullopt, form});
  check_tensor(backward_op, "grad", grad, x);
  check_tensor(backward_op, "z", z, x);
  const c10::SymDimVector outputs = output_shape(x, basis, coeff, form), maps = maps_shape(x, basis, form);
  TORCH_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(outputs), backward_op, ": grad has shape ",
                    grad.sym_sizes(), "; the output has shape ", c10::SymIntArrayRef(outputs));
  TORCH_CHECK_VALUE(z.sym_sizes() == c10::SymIntArrayRef(maps), backward_op, ": z has shape ", z.sym_sizes(),
                    "; the maps of the basis have shape ", c10::SymIntArrayRef(maps));
  if (z_bias.has_value()) {
    check_tensor(backward_op, "z_bias", *z_bias, x);
    TORCH_CHECK_VALUE(z_bias->dim() == 1 && z_bias->sym_size(0) == basis.sym_size(0), backward_op,
                      ": z_bias has shape ", z_bias->sym_sizes(), "; it needs one entry for each of ",
                      basis.sym_size(0), " basis filters");
  }
}

c10::SymDimVector maps_shape(const at::Tensor& x, const at::Tensor& basis, const Form& form) {
  return {x.sym_size(0), basis.sym_size(0), output_size(x.sym_size(2), basis.sym_size(2), form, 0),
          output_size(x.sym_size(3), basis.sym_size(3), form, 1)};
}

c10::SymDimVector output_shape(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                               const Form& form) {
  c10::SymDimVector shape = maps_shape(x, basis, form);
  shape[1] = output_channels(basis, coeff, form);
  return shape;
}

at::MemoryFormat output_format(const at::Tensor& x, const at::Tensor& basis) {
  const bool channels_last = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                             basis.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

}  // namespace growkernels::basis_conv
