#pragma once
// Whether float32 matrices are multiplied in full, or as bfloat16 in AMX's tiles because torch's setting allows it.

namespace growkernels {

// Why float32 matrices are multiplied in full; null where they are rounded to bfloat16: where torch may do so in its
// own products on the CPU (set_float32_matmul_precision("medium"), mkldnn's "bf16") and AMX makes it worth while.
const char* rounded_float32_obstacle();

}  // namespace growkernels
