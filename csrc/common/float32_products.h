#pragma once
// Who multiplies float32 and float64 matrices, and whether in full, or as bfloat16 in AMX's tiles because torch's
// setting allows it.

#include <c10/core/ScalarType.h>

namespace growkernels {

// Why float32 matrices are multiplied in full; null where they are rounded to bfloat16: where torch may do so in its
// own products on the CPU (set_float32_matmul_precision("medium"), mkldnn's "bf16") and AMX makes it worth while.
const char* rounded_float32_obstacle();

// Why the vendor's own product of wide float32 or float64 matrices is not taken where it would serve as it is; null
// where it is, because it is at the machine's peak and computes in full.
const char* vendor_product_obstacle(at::ScalarType dtype);

}  // namespace growkernels
