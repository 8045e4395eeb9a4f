// How the products with splitting matrices would be computed.

#include "common/plan.h"
#include "common/gemm_tile.h"
#include "splitting/cpu_plan.h"
#include "splitting/cpu_winograd.h"
#include "splitting/splitting.h"

#include <torch/library.h>

namespace growkernels::splitting {
namespace {

Choice splitting_hvp_plan(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v, at::Device device,
                          bool full_precision) {
  check_hvp({x, w, v, full_precision});
  if (!device.is_cpu()) {
    return {"aten", Refused()};
  }
  Refused refused;
  if (takes("bfloat16 tiles", tiles_obstacle(x.scalar_type(), full_precision), &refused)) {
    return {"bfloat16 tiles", refused};
  }
  const char* obstacle = vendor_obstacle({x, w, v, full_precision});
  return {takes("vendor's product", obstacle, &refused) ? "vendor's product" : "portable", refused};
}

Choice splitting_hvp_conv2d_plan(const at::Tensor& x, const at::Tensor& w, const at::Tensor& v, at::IntArrayRef stride,
                                 at::IntArrayRef padding, at::IntArrayRef dilation, at::Device device) {
  const Sliding sliding = parse_sliding(stride, padding, dilation);
  check_hvp_conv2d({x, w, v, stride, padding, dilation}, sliding);
  if (!device.is_cpu()) {
    return {"aten", Refused()};
  }
  Refused refused;
  const at::Tensor filters = v.dim() == 4 ? v.unsqueeze(1) : v;
  if (takes("winograd", winograd_obstacle(x, w, filters, sliding), &refused)) {
    return {"winograd", refused};
  }
  const char* obstacle = bfloat16_tiles_obstacle(x.scalar_type());
  return {takes("bfloat16 tiles", obstacle, &refused) ? "bfloat16 tiles" : "portable", refused};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) {
  m.impl("splitting_hvp_plan", &splitting_hvp_plan);
  m.impl("splitting_hvp_conv2d_plan", &splitting_hvp_conv2d_plan);
}

}  // namespace growkernels::splitting
