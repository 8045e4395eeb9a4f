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

Choice virtual_grad_plan(const at::Tensor& input, c10::string_view layer, at::Device device,
                         std::optional<int64_t> outputs) {
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
  const int64_t width = input.size(-1), height = outputs.value_or(width);
  if (takes("bfloat16 tiles", tiles_obstacle(input.scalar_type(), height, width), &refused)) {
    return {"bfloat16 tiles", refused};
  }
  const char* obstacle = vendor_obstacle(input.scalar_type(), kind, height, width);
  return {takes("vendor's product", obstacle, &refused) ? "vendor's product" : "portable", refused};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) { m.impl("virtual_grad_plan", &virtual_grad_plan); }

}  // namespace growkernels::virtual_grad
