#pragma once
// C[m, n] (+)= A[m, k] B[k, n] in row-major storage, bfloat16 with sums in float32, by the instructions that
// some CPUs have for it: AMX's tiles, or AVX-512's dot products of pairs. Nothing is compiled at run time.

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace growkernels {

enum class Bfloat16Unit { None, Avx512, Amx };

// The best one that this CPU has and its system lets us use. GROWKERNELS_BFLOAT16_TILES in the environment, one of
// "none", "avx512" and "amx", names the best one that may be used. None where torch itself is kept from AVX-512 by
// ATEN_CPU_CAPABILITY.
Bfloat16Unit bfloat16_unit();

// Why values of a dtype are not multiplied by them; null where they are.
const char* bfloat16_tiles_obstacle(c10::ScalarType dtype);

// What k is a multiple of in a product.
int64_t bfloat16_step();

// Not for Bfloat16Unit::None. B holds pairs of rows interleaved, element (i, j) at
// b[(i / 2) * 2 * ldb + 2 * j + i % 2].
void bfloat16_tile(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda, const c10::BFloat16* b,
                   int64_t ldb, float* c, int64_t ldc, bool accumulate);

// Ends a thread's series of products: gives back the registers that AMX reserves.
void release_bfloat16_tiles();

}  // namespace growkernels
