#include "basis_conv/plan.h"

#include "common/bfloat16_tile.h"
#include "convolution/algorithm.h"

#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
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
    case Algorithm::Tiles:
      return "tiles";
    case Algorithm::Direct:
      return "direct";
    case Algorithm::TwoConvolutions:
      return "two convolutions";
    case Algorithm::Reconstruct:
      return "reconstruct";
  }
  return "";
}

Algorithm composed_algorithm(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff, const Form& form) {
  const c10::SymInt maps = basis.sym_size(0), taps = basis.sym_numel() / maps, mixed = coeff.sym_size(0);
  const c10::SymInt outputs = mixed + (form.include_basis ? maps : 0);
  const c10::SymDimVector shape = maps_shape(x, basis, form);
  const c10::SymInt pixels = shape[0] * shape[2] * shape[3];
  // Multiply-adds, of which the pixelwise ones are slower; the reconstruction is shared by all pixels.
  const c10::SymInt separate = pixels * (maps * taps + maps * mixed);
  const c10::SymInt together = pixels * outputs * taps + maps * mixed * taps;
  return together < separate ? Algorithm::Reconstruct : Algorithm::TwoConvolutions;
}

namespace {

const char* winograd_obstacle(const at::Tensor& basis, const Form& form, const c10::SymDimVector& maps_shape) {
  const bool three_by_three = basis.sym_size(2) == 3 && basis.sym_size(3) == 3;
  if (!three_by_three || !all_are(form.stride, 1) || !all_are(form.dilation, 1)) {
    return "it is for 3 x 3 kernels with stride and dilation 1";
  }
  return convolution::winograd_obstacle(
      {basis.sym_size(1), basis.sym_size(0), maps_shape[0], maps_shape[2], maps_shape[3]});
}

const char* pointwise_obstacle(const at::Tensor& basis, const Form& form) {
  const bool one_by_one = basis.sym_size(2) == 1 && basis.sym_size(3) == 1;
  return one_by_one && all_are(form.stride, 1) && all_are(form.padding, 0)
             ? nullptr
             : "it is for 1 x 1 kernels with stride 1 and without padding";
}

// Its packed rows hold what lies beyond the image as well.
const char* tiles_obstacle(const at::Tensor& basis, const Form& form, const c10::SymDimVector& maps_shape) {
  for (size_t axis = 0; axis < 2; ++axis) {
    const c10::SymInt reach = form.dilation[axis] * (basis.sym_size(axis + 2) - 1);
    if (reach > 4 * maps_shape[axis + 2] + 64) {
      return "its kernel reaches far beyond the images";
    }
  }
  return nullptr;
}

}  // namespace

Algorithm choose_algorithm(at::DeviceType device, const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                           const Form& form, Refused* refused) {
  const auto taken = [refused](Algorithm algorithm, std::initializer_list<const char*> obstacles) {
    const char* const* const first =
        std::find_if(obstacles.begin(), obstacles.end(), [](auto o) { return o != nullptr; });
    return takes(name(algorithm), first == obstacles.end() ? nullptr : *first, refused);
  };
  const Algorithm composed = composed_algorithm(x, basis, coeff, form);
  const char* const costlier = composed == Algorithm::Reconstruct ? nullptr : "it takes more operations";
  if (device != at::kCPU) {
    return taken(Algorithm::Reconstruct, {costlier}) ? Algorithm::Reconstruct : Algorithm::TwoConvolutions;
  }
  const c10::SymDimVector shape = maps_shape(x, basis, form);
  const bool empty = x.sym_numel() == 0 || shape[0] * shape[2] * shape[3] == 0;
  // Against all of our kernels of float32, which 16-bit images are widened to, and against those that write
  // channels_last alone.
  const char* const any = x.scalar_type() == at::kDouble ? "it is for float32"
                          : empty                        ? "there are no images"
                                                         : nullptr;
  const char* const other = output_format(x, basis) != at::MemoryFormat::ChannelsLast
                                ? "neither the images nor the basis are channels_last"
                                : nullptr;
  const char* const winograd = any != nullptr ? any : winograd_obstacle(basis, form, shape);
  const char* const slower = winograd == nullptr && bfloat16_unit() == Bfloat16Unit::Avx512
                                 ? "Winograd's algorithm in float32 saves more than AVX-512's products of pairs"
                                 : nullptr;
  if (taken(Algorithm::Tiles, {bfloat16_tiles_obstacle(x.scalar_type()), empty ? "there are no images" : nullptr,
                               tiles_obstacle(basis, form, shape), slower})) {
    return Algorithm::Tiles;
  }
  if (taken(Algorithm::Winograd, {winograd})) {
    return Algorithm::Winograd;
  }
  if (taken(Algorithm::Pointwise, {any, other, pointwise_obstacle(basis, form)})) {
    return Algorithm::Pointwise;
  }
  if (taken(Algorithm::Reconstruct, {costlier})) {
    return Algorithm::Reconstruct;
  }
  return taken(Algorithm::Direct, {any, other}) ? Algorithm::Direct : Algorithm::TwoConvolutions;
}

namespace {

std::string basis_conv2d_algorithm(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                   c10::SymIntArrayRef dilation, bool include_basis) {
  const Form form{stride, padding, dilation, include_basis};
  check_forward("basis_conv2d_algorithm", {x, basis, coeff, std::nullopt, form});
  return name(choose_algorithm(x.device().type(), x, basis, coeff, form));
}

Choice basis_conv2d_plan(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff,
                         c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                         bool include_basis, at::Device device) {
  const Form form{stride, padding, dilation, include_basis};
  check_forward("basis_conv2d", {x, basis, coeff, std::nullopt, form});
  Refused refused;
  const Algorithm algorithm = choose_algorithm(device.type(), x, basis, coeff, form, &refused);
  return {name(algorithm), refused};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  m.impl("basis_conv2d_algorithm", &basis_conv2d_algorithm);
  m.impl("basis_conv2d_plan", &basis_conv2d_plan);
}

}  // namespace growkernels::basis_conv
