#include "common/kernels_ran.h"

#include <torch/library.h>

#include <array>
#include <atomic>
#include <string>
#include <vector>

namespace growkernels {
namespace {

// In Ran's order; as the plans call them.
constexpr std::array<const char*, 11> names = {"aten",   "winograd",         "pointwise",   "tiles",
                                               "direct", "two convolutions", "reconstruct", "vendor's product",
                                               "cuda",   "bfloat16 tiles",   "portable"};

std::atomic<uint32_t> seen{0};

// Names of the kernels that have run since the last call of this.
std::vector<std::string> kernels_ran() {
  const uint32_t bits = seen.exchange(0);
  std::vector<std::string> result;
  for (size_t i = 0; i < names.size(); ++i) {
    if (bits >> i & 1) {
      result.emplace_back(names[i]);
    }
  }
  return result;
}

}  // namespace

void note(Ran kernel) {
  const uint32_t bit = uint32_t{1} << static_cast<uint32_t>(kernel);
  if ((seen.load(std::memory_order_relaxed) & bit) == 0) {
    seen.fetch_or(bit, std::memory_order_relaxed);
  }
}

TORCH_LIBRARY_IMPL(growkernels, CatchAll, m) { m.impl("kernels_ran", &kernels_ran); }

}  // namespace growkernels
