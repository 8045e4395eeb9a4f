#pragma once
// Products of cache-sized tiles, the inner loop of every CPU kernel here:
//   C[m, n] (+)= A[m, k] B[k, n],  all row-major, single-threaded, called from inside at::parallel_for.
//
// Two backends. "brgemm": oneDNN's run-time generated micro-kernels, which ATen exports and which run
// at the machine's peak as long as the operands stay in cache. "portable": plain register-blocked loops
// of our own (portable_tile.h), for float64, other CPUs and other builds of torch.
// GROWKERNELS_BRGEMM=0 in the environment forces the second.

#include <ATen/core/Tensor.h>

#include <type_traits>

namespace growkernels {

// Sums of 16-bit and float32 products are kept in float32, sums of float64 products in float64.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Whether the brgemm backend can multiply tiles of this type on this machine in this process.
// Only float32 and bfloat16 can: oneDNN has no float64 kernels, and float16 tiles are widened to
// float32 while they are packed. The first call per type runs one small product and checks it.
bool brgemm_available(at::ScalarType dtype);

// The type that values of a dtype are multiplied in: bfloat16 is widened to float32 where it has no tiles.
at::ScalarType tile_dtype(at::ScalarType dtype);

// Why tiles of a dtype's values are not multiplied by brgemm; null where they are.
const char* brgemm_obstacle(at::ScalarType dtype);

// float32 and float64 tiles, on brgemm where it is available and on the portable loops elsewhere.
void multiply_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc, bool accumulate);
void multiply_tile(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                   double* c, int64_t ldc, bool accumulate);

// bfloat16 tiles: k is even and B holds pairs of rows interleaved, element (i, j) at
// b[(i / 2) * 2 * ldb + 2 * j + i % 2]. Only where brgemm_available(at::kBFloat16).
void multiply_tile(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
                   int64_t ldb, float* c, int64_t ldc, bool accumulate);

// Ends a thread's series of products: gives back the tile registers that some CPUs reserve (AMX).
void release_tiles();

}  // namespace growkernels
