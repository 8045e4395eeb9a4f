#include "virtual_grad/cpu_plan.h"

#include "common/float32_products.h"
#include "common/gemm_tile.h"
#include "wide_products/wide_products.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace growkernels::virtual_grad {
namespace {

// Measured on Zen 4 (1 MiB of L2 per core): a tile of 384 x 384 and chunks of 96 samples; the sums weigh
// more beside the faster bfloat16 products, so those take longer chunks. Of float64 half the rows are as many bytes.
constexpr int64_t tile_rows = 384;
constexpr int64_t tile_rows_float64 = 192;
constexpr int64_t tile_columns = 384;
constexpr int64_t chunk_elements = 96 * 384;
constexpr int64_t chunk_elements_bfloat16 = 256 * 384;
// A gradient with fewer rows or columns than a register has lanes costs as much as its operands take to arrive:
// in whole rows, of which few stay in L1 until all of the row is used (measured on Sapphire Rapids).
constexpr int64_t register_bytes = 64;
constexpr int64_t narrow_chunk_bytes = 24 << 10;
constexpr int64_t max_chunk = 2048;
// From here on the vendor's product alone is faster than ours with the norm (measured on Sapphire Rapids).
constexpr int64_t vendor_features = 256;
// Without AVX-512 it is with masks and activations applied before it as well, and without any from fewer features on
// (measured on Zen 3).
constexpr int64_t vendor_features_of_avx2 = 192;
constexpr int64_t serial_below_products = 1 << 20;  // starting threads costs more than this much work

// What a position is multiplied in.
at::ScalarType operands_of(const Position& position) {
  return position.rounded ? at::kBFloat16 : tile_dtype(position.h.scalar_type());
}

// Not for bfloat16 tiles, which are whole whatever they hold.
bool is_narrow(int64_t elements, const Position& position) {
  const at::ScalarType dtype = operands_of(position);
  return dtype != at::kBFloat16 && elements * static_cast<int64_t>(c10::elementSize(dtype)) <= register_bytes;
}

bool has_narrow_side(const Position& position) {
  return is_narrow(std::min(position.width, position.height), position);
}

}  // namespace

const char* tiles_obstacle(at::ScalarType dtype, int64_t height, int64_t width) {
  if (dtype != at::kFloat) {
    return bfloat16_tiles_obstacle(dtype);
  }
  constexpr int64_t narrow = 32;  // one block of the tiles: loading takes longer than multiplying
  const char* obstacle = rounded_float32_obstacle();
  return obstacle == nullptr && std::min(height, width) <= narrow ? "for so few features float32 is faster" : obstacle;
}

const char* vendor_obstacle(at::ScalarType dtype, const Kind& kind, int64_t height, int64_t width) {
  const bool masked = kind.layer != Layer::Linear;
  if (vendor_leads_without_avx512(dtype)) {
    const int64_t fewest = masked ? vendor_features : vendor_features_of_avx2;
    return std::min(height, width) < fewest ? "for so few features one pass over all positions is faster" : nullptr;
  }
  if (masked) {
    return "a mask or an activation is applied on the way";
  }
  if (std::min(height, width) < vendor_features) {
    return "for so few features one pass over all positions is faster";
  }
  return vendor_product_obstacle(dtype);
}

int64_t chunk_of(const Position& position) {
  if (has_narrow_side(position)) {
    const int64_t row_bytes =
        std::max<int64_t>(1, std::max(position.width, position.height)) * position.h.element_size();
    return std::clamp<int64_t>(narrow_chunk_bytes / row_bytes / 8 * 8, 8, max_chunk);
  }
  const int64_t widest = std::max<int64_t>(1, std::min(std::max(position.width, position.height), tile_rows));
  const bool bfloat16 = position.rounded || position.h.scalar_type() == at::kBFloat16;
  const int64_t elements = bfloat16 ? chunk_elements_bfloat16 : chunk_elements;
  return std::clamp<int64_t>(elements / widest / 32 * 32, 32, max_chunk);
}

Plan make_plan(const std::vector<Position>& positions) {
  Plan plan;
  int64_t total = 0;
  for (const Position& p : positions) {
    total += p.samples * p.height * p.width;
  }
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  plan.parallel = threads > 1 && total > serial_below_products;
  const int64_t largest_item = plan.parallel ? std::max<int64_t>(1, total / (4 * threads)) : total;
  for (size_t l = 0; l < positions.size(); ++l) {
    const Position& p = positions[l];
    const int64_t chunk = chunk_of(p);
    const int64_t most_rows = is_narrow(p.width, p)              ? p.height
                              : p.h.scalar_type() == at::kDouble ? tile_rows_float64
                                                                 : tile_rows;
    const int64_t most_columns = is_narrow(p.height, p) ? p.width : tile_columns;
    for (int64_t row = 0; row < p.height; row += most_rows) {
      for (int64_t column = 0; column < p.width; column += most_columns) {
        Tile tile{static_cast<int64_t>(l),
                  row,
                  std::min(most_rows, p.height - row),
                  column,
                  std::min(most_columns, p.width - column),
                  is_narrow(p.width, p) && p.width < p.height,
                  1};
        const int64_t products = p.samples * tile.rows * tile.columns;
        const int64_t chunks = (p.samples + chunk - 1) / chunk;
        if (products > largest_item) {
          tile.items = std::min((products + largest_item - 1) / largest_item, std::max<int64_t>(chunks, 1));
        }
        const int64_t chunks_per_item = (chunks + tile.items - 1) / std::max<int64_t>(tile.items, 1);
        tile.items = chunks == 0 ? 1 : (chunks + chunks_per_item - 1) / chunks_per_item;
        for (int64_t i = 0; i < tile.items; ++i) {
          plan.items.push_back({static_cast<int64_t>(plan.tiles.size()), i, i * chunks_per_item * chunk,
                                std::min(p.samples, (i + 1) * chunks_per_item * chunk)});
        }
        plan.tiles.push_back(tile);
      }
    }
  }
  if (plan.parallel) {  // longest first, so that no thread is left alone with a long item at the end
    const auto cost = [&](const Item& item) {
      return (item.end - item.begin) * plan.tiles[item.tile].rows * plan.tiles[item.tile].columns;
    };
    std::stable_sort(plan.items.begin(), plan.items.end(),
                     [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
  }
  return plan;
}

}  // namespace growkernels::virtual_grad
