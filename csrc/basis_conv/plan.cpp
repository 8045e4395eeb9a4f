#include "basis_conv/plan.h"

#include "convolution/algorithm.h"

#include <torch/library.h>

#include <string>

namespace growkernels::basis_conv {
namespace {

bool all_are(c10::SymIntArrayRef values, int64_t value) {
  for (const c10::SymInt& entry : values) {
    if (entry != value) {
      return false;
    }
  }
  return true;
}

}  // namespace

const char* name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::Winograd:
      return "winograd";
    case Algorithm::Pointwise:
      return "pointwise";
    case Algorithm::Direct:
      return "direct";
    case Algorithm::TwoConvolutions:
      return "two convolutions";
    case Algorithm::Reconstruct:
      return "reconstruct";
  }
  return "";
}

Algorithm choose_algorithm(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff, const Form& form) {
  const c10::SymInt maps = basis.sym_size(0), taps = basis.sym_numel() / maps, mixed = coeff.sym_size(0);
  const c10::SymInt outputs = mixed + (form.include_basis ? maps : 0);
  const c10::SymDimVector shape = maps_shape(x, basis, form);
  const c10::SymInt pixels = shape[0] * shape[2] * shape[3];
  const bool own_kernels = x.is_cpu() && x.scalar_type() == at::kFloat && x.sym_numel() > 0 && pixels > 0;

  if (own_kernels && basis.sym_size(2) == 3 && basis.sym_size(3) == 3 && all_are(form.stride, 1) &&
      all_are(form.dilation, 1) && convolution::use_winograd({basis.sym_size(1), maps, shape[0], shape[2], shape[3]})) {
    return Algorithm::Winograd;
  }
  const bool in_channels_last = output_format(x, basis) == at::MemoryFormat::ChannelsLast;
  if (own_kernels && in_channels_last && taps == basis.sym_size(1) && all_are(form.stride, 1) &&
      all_are(form.padding, 0)) {
    return Algorithm::Pointwise;
  }
  // Multiply-adds, of which the pixelwise ones are slower; the reconstruction is shared by all pixels.
  const c10::SymInt separate = pixels * (maps * taps + maps * mixed);
  const c10::SymInt together = pixels * outputs * taps + maps * mixed * taps;
  if (together < separate) {
    return Algorithm::Reconstruct;
  }
  return own_kernels && in_channels_last ? Algorithm::Direct : Algorithm::TwoConvolutions;
}

namespace {

std::string basis_conv2d_algorithm(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                   c10::SymIntArrayRef dilation, bool include_basis) {
  const Form form{stride, padding, dilation, include_basis};
  check_forward("basis_conv2d_algorithm", x, basis, coeff, std::nullopt, form);
  return name(choose_algorithm(x, basis, coeff, form));
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  m.impl("basis_conv2d_algorithm", &basis_conv2d_algorithm);
}

}  // namespace growkernels::basis_conv
