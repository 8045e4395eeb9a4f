#pragma once
// C[m, n] (+)= A[m, k] B[k, n] in row-major storage, for float32 and float64, with nothing but the compiler.

#include <cstdint>

namespace growkernels {

void portable_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc, bool accumulate);
void portable_tile(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                   double* c, int64_t ldc, bool accumulate);

// The same with A stored [k, m]: C (+)= A^T B, a sum of outer products.
void portable_transposed_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                              float* c, int64_t ldc, bool accumulate);
void portable_transposed_tile(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
                              int64_t ldb, double* c, int64_t ldc, bool accumulate);

}  // namespace growkernels
