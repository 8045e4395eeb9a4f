// The user's choice of how the 3 x 3 convolutions inside are computed.

#include "basis_conv/basis_conv.h"

#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace growkernels::basis_conv {
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

void set_basis_conv_algorithm(c10::string_view algorithm) { setting() = parse("set_conv_algorithm", algorithm); }

std::string basis_conv_algorithm() { return names[static_cast<size_t>(conv_algorithm())]; }

}  // namespace

ConvAlgorithm conv_algorithm() { return setting(); }

TORCH_LIBRARY_IMPL(growkernels, CatchAll, m) {
  m.impl("set_basis_conv_algorithm", &set_basis_conv_algorithm);
  m.impl("basis_conv_algorithm", &basis_conv_algorithm);
}

}  // namespace growkernels::basis_conv
