#include "convolution/algorithm.h"

#include "convolution/winograd_transforms.h"

#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

namespace growkernels::convolution {
namespace {

constexpr const char* variable = "GROWKERNELS_CONV_ALGORITHM";
constexpr std::array<const char*, 3> names = {"auto", "direct", "winograd"};  // in ConvAlgorithm's order

ConvAlgorithm parse(const char* source, c10::string_view name) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) {
      return static_cast<ConvAlgorithm>(i);
    }
  }
  TORCH_CHECK_VALUE(false, source, ": unknown algorithm '", name, "'; use 'auto', 'direct' or 'winograd'");
}

std::atomic<ConvAlgorithm>& setting() {
  static std::atomic<ConvAlgorithm> value = [] {
    const char* name = std::getenv(variable);
    return name == nullptr || *name == '\0' ? ConvAlgorithm::Auto : parse(variable, name);
  }();
  return value;
}

void set_conv_algorithm(c10::string_view algorithm) { setting() = parse("set_conv_algorithm", algorithm); }

std::string conv_algorithm_name() { return names[static_cast<size_t>(conv_algorithm())]; }

}  // namespace

ConvAlgorithm conv_algorithm() { return setting(); }

const char* winograd_obstacle(const OutputSize& size) {
  switch (conv_algorithm()) {
    case ConvAlgorithm::Direct:
      return "set_conv_algorithm or GROWKERNELS_CONV_ALGORITHM asks for 'direct'";
    case ConvAlgorithm::Winograd:
      return nullptr;
    case ConvAlgorithm::Auto:
      break;
  }
  // Narrow layers leave the tiles' products too small to pay for the transforms, few tiles do not pay
  // for the kernels' transform, and a tile costs as much at an edge where it covers few pixels.
  const auto tiles_along = [](const c10::SymInt& pixels) { return (pixels + tile_outputs - 1) / tile_outputs; };
  const c10::SymInt tiles = size.batch * tiles_along(size.height) * tiles_along(size.width);
  const c10::SymInt pixels = size.batch * size.height * size.width;
  const bool pays = size.inputs >= 16 && size.outputs >= 8 && tiles >= 32 && pixels >= 8 * tiles;
  return pays ? nullptr : "its transforms do not pay for so few channels or pixels";
}

TORCH_LIBRARY_IMPL(growkernels, CatchAll, m) {
  m.impl("set_conv_algorithm", &set_conv_algorithm);
  m.impl("conv_algorithm", &conv_algorithm_name);
}

}  // namespace growkernels::convolution
