#include "splitting/cpu_plan.h"

#include "common/bfloat16_tile.h"
#include "common/float32_products.h"
#include "wide_products/wide_products.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace growkernels::splitting {
namespace {

// Measured on Zen 4 (1 MiB of L2 per core), float32.
constexpr int64_t rows_per_block = 256;
constexpr int64_t vectors_per_tile = 96;
constexpr int64_t columns_per_chunk = 512;
constexpr int64_t most_vectors_per_range = 384;
constexpr int64_t sums_per_range = 384 * 384;       // of one thread at a time, in L2 beside the rows
constexpr int64_t fewest_vectors = 128;             // of a thread that has vectors of its own
constexpr int64_t serial_below_products = 1 << 19;  // starting threads costs more than this much work
// From so many features on the vendor's two products are faster (measured on Sapphire Rapids) where P, which they
// write and read, is no larger than X, and up to so many rows, where P is still in cache and packing the vectors takes
// a part of the time.
constexpr int64_t vendor_rows = 1024;
constexpr int64_t vendor_features = 256;
// Without AVX-512 they are faster however many rows there are, from so many features and neurons on (Zen 3).
constexpr int64_t vendor_features_of_avx2 = 192;
constexpr int64_t vendor_neurons_of_avx2 = 512;
constexpr int64_t partial_bytes = 16 << 20;  // of sums over ranges of rows, at most

}  // namespace

Plan make_plan(const Problem& problem) {
  Plan plan;
  const int64_t k = problem.vectors_per_neuron(), width = problem.width();
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  plan.parallel = threads > 1 && problem.rows() * problem.vectors() * width > serial_below_products;
  plan.rows_per_block = rows_per_block;
  plan.columns_per_chunk = columns_per_chunk;
  plan.neurons_per_tile = std::max<int64_t>(1, vectors_per_tile / k);

  const int64_t vectors_per_range = std::clamp(sums_per_range / width, vectors_per_tile, most_vectors_per_range);
  int64_t ranges = at::divup(problem.vectors(), vectors_per_range), row_ranges = 1;
  if (plan.parallel) {
    if (problem.vectors() / threads >= fewest_vectors) {  // every thread has neurons of its own
      ranges = at::divup(ranges, threads) * threads;
    } else {
      const int64_t blocks = at::divup(problem.rows(), plan.rows_per_block);
      const int64_t fits = partial_bytes / (problem.vectors() * width * 8);
      row_ranges = std::clamp<int64_t>(at::divup(4 * threads, ranges), 1, std::max<int64_t>(1, std::min(blocks, fits)));
    }
  }
  const int64_t neurons_per_range = std::max<int64_t>(1, at::divup(problem.neurons(), ranges));
  const int64_t rows_per_item = at::divup(at::divup(problem.rows(), row_ranges), 8) * 8;
  for (int64_t i = 0; i < problem.neurons(); i += neurons_per_range) {
    Range range{i, std::min(problem.neurons(), i + neurons_per_range), 0};
    for (int64_t m = 0; m < problem.rows(); m += rows_per_item) {
      plan.items.push_back(
          {static_cast<int64_t>(plan.ranges.size()), range.items++, m, std::min(problem.rows(), m + rows_per_item)});
    }
    plan.ranges.push_back(range);
  }
  return plan;
}

const char* tiles_obstacle(at::ScalarType dtype, bool full_precision) {
  if (dtype != at::kFloat) {
    return bfloat16_tiles_obstacle(dtype);
  }
  return full_precision ? "full precision was asked for" : rounded_float32_obstacle();
}

const char* vendor_obstacle(const Hvp& call) {
  const int64_t features = call.x.size(1), neurons = call.w.size(1);
  if (vendor_leads_without_avx512(call.x.scalar_type())) {
    if (features < vendor_features_of_avx2 || neurons < vendor_neurons_of_avx2) {
      return "for so few features or neurons one pass is faster";
    }
    return call.v.numel() / features > neurons ? "of several vectors of each neuron one pass is faster" : nullptr;
  }
  if (std::min(features, neurons) < vendor_features) {
    return "for so few features one pass is faster";
  }
  if (call.x.size(0) > vendor_rows && call.v.numel() / features > features) {
    return "of so many rows and neurons one pass is faster";
  }
  return vendor_product_obstacle(call.x.scalar_type());
}

}  // namespace growkernels::splitting
