#include "wide_products/wide_products.h"

#include <ATen/Context.h>

namespace growkernels {
namespace {

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") != 0;
#else
  return false;
#endif
}

}  // namespace

bool vendor_leads_without_avx512(at::ScalarType dtype) {
  if (has_avx512() || !at::hasMKL()) {
    return false;
  }
  const at::Float32Precision allowed =
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  const bool rounds = allowed == at::Float32Precision::BF16 || allowed == at::Float32Precision::TF32;
  return dtype == at::kDouble || (dtype == at::kFloat && !rounds);
}

}  // namespace growkernels
