#include "common/float32_products.h"

#include "common/bfloat16_tile.h"

#include <ATen/Context.h>

namespace growkernels {
namespace {

at::Float32Precision allowed_precision() {
  return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
}

bool is_made_by_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

}  // namespace

const char* rounded_float32_obstacle() {
  if (allowed_precision() != at::Float32Precision::BF16) {
    return "torch is not set to round float32 to bfloat16";
  }
  if (bfloat16_unit() == Bfloat16Unit::Avx512) {
    return "for float32 only AMX's are faster";
  }
  return bfloat16_tiles_obstacle(c10::ScalarType::BFloat16);
}

const char* vendor_product_obstacle(at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kDouble) {
    return "it is for float32 and float64";
  }
  if (!at::hasMKL() || !is_made_by_intel()) {  // elsewhere ours was measured ahead of it
    return "it is at the machine's peak only where torch has MKL, on CPUs of Intel";
  }
  const at::Float32Precision allowed = allowed_precision();
  if (dtype == at::kFloat && (allowed == at::Float32Precision::BF16 || allowed == at::Float32Precision::TF32)) {
    return "torch may round in its float32 products";
  }
  return nullptr;
}

}  // namespace growkernels
