#pragma once
// Who multiplies wide float32 and float64 matrices on CPUs whose best vectors have 32 bytes. Beside AVX-512 our own
// products keep up with the vendor's, or nearly (common/float32_products.h).

#include <c10/core/ScalarType.h>

namespace growkernels {

// Whether the vendor's products are ahead of ours, with P or a masked operand in memory: where torch has MKL, on a CPU
// without AVX-512, and torch may not round in them (measured on Zen 3: by 2 to 35 %).
bool vendor_leads_without_avx512(at::ScalarType dtype);

}  // namespace growkernels
