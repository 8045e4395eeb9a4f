// How the gradient at a position would be computed.

#include "common/plan.h"
#include "common/gemm_tile.h"
#include "virtual_grad/cpu_plan.h"
#include "virtual_grad/cpu_winograd.h"
#include "virtual_grad/virtual_grad.h"

#include <torch/library.h>

#include <string>

namespace growkernels::virtual_grad {

const char* cuda_obstacle(at::ScalarType dtype, const Kind& kind) {
  if (kind.layer == Layer::Conv2dRelu) {
    return "the vendor's weight gradient of a convolution serves as is";
  }
  return dtype == at::kDouble ? "float64 is left to the vendor's products" : nullptr;
}

namespace {

// The last columns of a wide gradient may be so few that they are multiplied in another way than the others.
std::string with_tiles(const at::Tensor& input, Refused* refused) {
  Position position;
  position.h = as_rows(input);
  position.samples = position.h.size(0);
  position.width = position.h.size(1);
  const at::ScalarType dtype = input.scalar_type();
  std::string first;
  for (const Tile& tile : make_plan({position}).tiles) {
    const char* obstacle = brgemm_obstacle(dtype);
    if (obstacle == nullptr && by_outer_products(tile_dtype(dtype), tile.columns)) {
      obstacle = "from 16 columns on, loops that take the gradient as it lies are faster";
    }
    const std::string backend = takes("brgemm", obstacle, first.empty() ? refused : nullptr) ? "brgemm" : "portable";
    if (!first.empty() && backend != first) {
      return first + " and " + backend;
    }
    first = backend;
  }
  return first.empty() ? "portable" : first;
}

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
  const std::string backend = with_tiles(input, &refused);
  return {backend, refused};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) { m.impl("virtual_grad_plan", &virtual_grad_plan); }

}  // namespace growkernels::virtual_grad
