#include "common/float32_products.h"

#include "common/bfloat16_tile.h"

#include <ATen/Context.h>

namespace growkernels {

const char* rounded_float32_obstacle() {
  const auto allowed = at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  if (allowed != at::Float32Precision::BF16) {
    return "torch is not set to round float32 to bfloat16";
  }
  if (bfloat16_unit() == Bfloat16Unit::Avx512) {
    return "for float32 only AMX's are faster";
  }
  return bfloat16_tiles_obstacle(c10::ScalarType::BFloat16);
}

}  // namespace growkernels
