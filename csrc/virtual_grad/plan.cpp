// How the gradient at a position would be computed.

#include "common/plan.h"
#include "virtual_grad/cpu_plan.h"
#include "virtual_grad/cpu_winograd.h"
#include "virtual_grad/virtual_grad.h"

#include <torch/library.h>

namespace growkernels::virtual_grad {

const char* cuda_obstacle(at::ScalarType dtype, const Kind& kind) {
  if (kind.layer == Layer::Conv2dRelu) {
    return "the vendor's weight gradient of a convolution serves as is";
  }
  if (kind.layer == Layer::Linear) {
    return "without a mask or an activation the vendor's products serve as they are";
  }
  return dtype == at::kDouble ? "float64 is left to the vendor's products" : nullptr;
}

namespace {

Choice virtual_grad_plan(const at::Tensor& input, c10::string_view layer, at::Device device) {
  const Positions call{input, input, layer, "tanh", 1};
  const Kind kind = call.kind();
  check_positions("virtual_grad", call, kind);
  Refused refused;
  if (device.is_cuda()) {
    return {takes("cuda", cuda_obstacle(input.scalar_type(), kind), &refused) ? "cuda" : "aten", refused};
  }
  if (!device.is_cpu()) {
    return {"aten", refused};
  }
  if (kind.layer == Layer::Conv2dRelu) {
    return {takes("winograd", winograd_obstacle(input), &refused) ? "winograd" : "aten", refused};
  }
  const char* obstacle = tiles_obstacle(input.scalar_type(), input.size(-1), input.size(-1));
  return {takes("bfloat16 tiles", obstacle, &refused) ? "bfloat16 tiles" : "portable", refused};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) { m.impl("virtual_grad_plan", &virtual_grad_plan); }

}  // namespace growkernels::virtual_grad
