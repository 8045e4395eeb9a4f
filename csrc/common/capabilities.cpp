// Queries about this machine, for `growkernels info` and for the benchmarks' ceilings.

#include "common/gemm_tile.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

namespace growkernels {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// GFLOP/s of back-to-back products of one tile that stays in each core's L2 cache.
template <typename T>
double tile_rate(double seconds) {
  constexpr int64_t m = 64, n = 384, k = 256, products_per_check = 16;
  const int threads = at::get_num_threads();
  std::vector<double> rates(threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const std::vector<T> a(m * k, T(1)), b(k * n, T(1));
      std::vector<accumulate_t<T>> c(m * n);
      const auto run = [&] { multiply_tile(m, n, k, a.data(), k, b.data(), n, c.data(), n, false); };
      run();
      int64_t products = 0;
      const auto start = std::chrono::steady_clock::now();
      do {
        for (int64_t i = 0; i < products_per_check; ++i) {
          run();
        }
        products += products_per_check;
      } while (seconds_since(start) < seconds);
      rates[thread] = 2.0 * m * n * k * static_cast<double>(products) / seconds_since(start) / 1e9;
      release_bfloat16_tiles();
    }
  });
  double total = 0;
  for (const double rate : rates) {
    total += rate;
  }
  return total;
}

double gemm_ceiling(at::ScalarType dtype, double milliseconds) {
  TORCH_CHECK_VALUE(milliseconds > 0, "gemm_ceiling: milliseconds must be positive, got ", milliseconds);
  const double seconds = milliseconds / 1e3;
  switch (dtype) {
    case at::kFloat:
      return tile_rate<float>(seconds);
    case at::kDouble:
      return tile_rate<double>(seconds);
    case at::kBFloat16:
      return bfloat16_unit() == Bfloat16Unit::None ? tile_rate<float>(seconds) : tile_rate<at::BFloat16>(seconds);
    default:
      TORCH_CHECK_TYPE(false, "gemm_ceiling: dtype must be float32, float64 or bfloat16, got ", dtype);
  }
}

std::string bfloat16_tiles() {
  switch (bfloat16_unit()) {
    case Bfloat16Unit::Amx:
      return "amx";
    case Bfloat16Unit::Avx512:
      return "avx512";
    case Bfloat16Unit::None:
      return "none";
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CatchAll, m) {
  m.impl("bfloat16_tiles", &bfloat16_tiles);
  m.impl("gemm_ceiling", &gemm_ceiling);
}

}  // namespace growkernels
