#include "common/gemm_tile.h"

#include "common/kernels_ran.h"
#include "common/portable_tile.h"

#include <ATen/native/CPUBlas.h>

#include <array>
#include <cstdlib>
#include <exception>
#include <string_view>

namespace growkernels {
namespace {

bool brgemm_wanted() {
  static const bool wanted = [] {
    const char* value = std::getenv("GROWKERNELS_BRGEMM");
    return value == nullptr || std::string_view(value) != "0";
  }();
  return wanted;
}

// ATen offers no query for what its brgemm can do, and answers an unsupported case with an exception,
// so ask by doing: one product of small integers, which every correct kernel returns exactly.
template <typename T>
bool probe() {
  constexpr int64_t m = 3, n = 5, k = 8;
  constexpr int64_t interleave = std::is_same_v<T, at::BFloat16> ? 2 : 1;
  std::array<T, m * k> a;
  std::array<T, k * n> b;
  std::array<float, m * n> expected{}, c{};
  const auto a_value = [](int64_t i, int64_t p) { return static_cast<float>((i + 2 * p) % 7 - 3); };
  const auto b_value = [](int64_t p, int64_t j) { return static_cast<float>((3 * p + j) % 5 - 2); };
  for (int64_t p = 0; p < k; ++p) {
    for (int64_t i = 0; i < m; ++i) {
      a[i * k + p] = static_cast<T>(a_value(i, p));
      for (int64_t j = 0; j < n; ++j) {
        expected[i * n + j] += a_value(i, p) * b_value(p, j);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      b[(p / interleave) * interleave * n + interleave * j + p % interleave] = static_cast<T>(b_value(p, j));
    }
  }
  try {
    at::native::cpublas::brgemm(m, n, k, k, n, n, false, a.data(), b.data(), c.data(), interleave > 1);
    at::native::cpublas::brgemm_release(interleave > 1);
  } catch (const std::exception&) {
    return false;
  }
  return c == expected;
}

}  // namespace

bool brgemm_available(at::ScalarType dtype) {
  if (!brgemm_wanted()) {
    return false;
  }
  if (dtype == at::kFloat) {
    static const bool available = probe<float>();
    return available;
  }
  if (dtype == at::kBFloat16) {
    static const bool available = probe<at::BFloat16>();
    return available;
  }
  return false;
}

at::ScalarType tile_dtype(at::ScalarType dtype) {
  return dtype == at::kHalf || (dtype == at::kBFloat16 && !brgemm_available(dtype)) ? at::kFloat : dtype;
}

const char* brgemm_obstacle(at::ScalarType dtype) {
  if (brgemm_available(tile_dtype(dtype))) {
    return nullptr;
  }
  if (dtype == at::kDouble) {
    return "oneDNN has no float64 tiles";
  }
  return brgemm_wanted() ? "oneDNN in this torch has no tiles for it on this CPU" : "GROWKERNELS_BRGEMM=0";
}

void multiply_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc, bool accumulate) {
  if (brgemm_available(at::kFloat)) {
    note(Ran::Brgemm);
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, false);
  } else {
    note(Ran::Portable);
    portable_tile(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  }
}

void multiply_tile(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                   double* c, int64_t ldc, bool accumulate) {
  note(Ran::Portable);
  portable_tile(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

void multiply_tile(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
                   int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  note(Ran::Brgemm);
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, true);
}

void release_tiles() {
  if (brgemm_available(at::kBFloat16)) {
    at::native::cpublas::brgemm_release(true);
  }
}

}  // namespace growkernels
