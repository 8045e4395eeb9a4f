#pragma once
// From a call to launches. The device is a parameter: torch's (cuda_launch.h), or a host that emulates
// one in tests. It has
//   int multiprocessors, shared_bytes;                                    // the latter: most for a block
//   void* workspace(size_t bytes);                                        // aligned to 16 bytes
//   void launch(void (*kernel)(Table), int blocks, int threads, int shared_bytes, const Table&);

#include "virtual_grad/cuda_narrow.cuh"
#include "virtual_grad/cuda_plan.h"
#include "virtual_grad/cuda_products.cuh"

#include <iterator>

namespace growkernels::virtual_grad::cuda {

template <typename... Tiles>
struct TileList {};

// The kinds of tiles there are for a dtype. Wide ones read less: every column of a tile is read once for
// all of its rows, and a tile as wide as G needs no input but its own columns for the mask.
template <typename Element>
using HalfTiles = TileList<HalfTile<Element, 128, 384, 64, 64, 1>, HalfTile<Element, 128, 256, 64, 64, 1>,
                           HalfTile<Element, 128, 128, 64, 64, 2>, HalfTile<Element, 64, 64, 32, 32, 4>>;
using Tf32Tiles = TileList<Tf32Tile<128, 128, 64, 64, 2>, Tf32Tile<64, 64, 32, 32, 4>>;
using FloatTiles = TileList<FloatTile<128, 128, 2>, FloatTile<64, 64, 4>>;

template <typename Tile>
TileShape shape_of() {
  // A step must bring in rows + columns for rows * columns products: the more it brings for each, the
  // slower it is. 96 is where reading and multiplying take equally long on an H100.
  const double products_per_element = 1.0 * Tile::rows * Tile::columns / (Tile::rows + Tile::columns);
  return {Tile::rows,   Tile::columns,
          Tile::depth,  Tile::values / Tile::values_per_sum_block,
          Tile::blocks, std::min(1.0, products_per_element / 96)};
}

template <typename Element>
bool in_vectors(const void* x, int64_t stride) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride * sizeof(Element) % 16 == 0;
}

template <typename Device>
class Run {
 public:
  Run(const Call& call, Device& device) : call_(call), device_(device) {}

  template <typename Tiles>
  void run() {
    std::vector<int> widths[3];  // up to 8, up to 16, wider: entries of the lists
    for (size_t l = 0; l < call_.inputs.size(); ++l) {
      const int width = call_.inputs[l].width;
      widths[width <= 8 ? 0 : width <= 16 ? 1 : 2].push_back(static_cast<int>(l));
    }
    if (!widths[0].empty() && !widths[1].empty()) {
      widths[1].insert(widths[1].end(), widths[0].begin(), widths[0].end());
      widths[0].clear();
    }
    run_chosen(widths, Tiles{});
  }

 private:
  template <typename First, typename... Rest>
  void run_chosen(const std::vector<int> (&widths)[3], TileList<First, Rest...> tiles) {
    using Element = typename First::Element;
    run_narrow<Element, 8>(widths[0]);
    run_narrow<Element, 16>(widths[1]);
    if (!widths[2].empty()) {
      run_tiles(widths[2], tiles);
    }
  }

  template <typename Element, int Width>
  void run_narrow(const std::vector<int>& chosen) {
    if (chosen.empty()) {
      return;
    }
    // A step takes a hundred times as long as its products would: it waits for memory.
    constexpr int groups = narrow_threads / Width;
    Plan plan = make_plan(call_.inputs, chosen, {Width, Width, groups, 1, 1, 1}, device_.multiprocessors);
    launch_all<NarrowTile<Element, Width>>(plan, &sum_narrow_products<Element, Width>, narrow_threads, 0, false);
  }

  template <typename... Tiles>
  void run_tiles(const std::vector<int>& chosen, TileList<Tiles...>) {
    Plan plans[] = {plan_for<Tiles>(chosen)...};
    Plan& best = *std::min_element(std::begin(plans), std::end(plans),
                                   [](const Plan& a, const Plan& b) { return a.cost < b.cost; });
    const Plan* plan = plans;
    (void)((plan++ == &best ? (launch_tiles<Tiles>(best), true) : false) || ...);
  }

  // The last tile of a list fits into every GPU.
  template <typename Tile>
  Plan plan_for(const std::vector<int>& chosen) const {
    Plan plan = make_plan(call_.inputs, chosen, shape_of<Tile>(), device_.multiprocessors);
    if (shared_bytes_of<Tile>(true) + 1024 > device_.shared_bytes) {
      plan.cost = std::numeric_limits<double>::infinity();
    }
    return plan;
  }

  template <typename Tile>
  static int shared_bytes_of(bool mask_tile) {
    return Tile::stages * stage_elements<Tile>(mask_tile) * static_cast<int>(sizeof(typename Tile::Element));
  }

  template <typename Tile>
  void launch_tiles(Plan& plan) {
    bool mask_tile = false;
    for (Position& p : plan.positions) {
      p.h_vectors = in_vectors<typename Tile::Element>(p.h, p.h_stride);
      p.g_vectors = in_vectors<typename Tile::Element>(p.g, p.g_stride);
      // Rows [128 r, 128 r + 128) lie among the columns of every tile only if there is one across.
      mask_tile |= call_.kind.layer == Layer::LinearRelu && (p.tiles_across > 1 || Tile::columns % Tile::rows != 0);
    }
    launch_all<Tile>(plan, &sum_products<Tile>, Tile::threads, shared_bytes_of<Tile>(mask_tile), mask_tile);
  }

  template <typename Tile>
  void launch_all(const Plan& plan, void (*products)(Table), int threads, int shared_bytes, bool mask_tile) {
    Table table{};
    table.mask_tile = mask_tile;
    table.layer = call_.kind.layer;
    table.activation = call_.kind.activation;
    table.scale = static_cast<float>(call_.kind.scale);
    table.store = call_.store;
    table.norms = call_.norms;
    table.second_moments = call_.second_moments;
    table.second_moments_stride = call_.second_moments_stride;
    const size_t squares_bytes = (plan.squares * sizeof(Squares) + 15) / 16 * 16;
    char* workspace = static_cast<char*>(
        device_.workspace(squares_bytes + plan.partials * Tile::rows * Tile::columns * sizeof(float)));
    table.squares = reinterpret_cast<Squares*>(workspace);
    table.partials = reinterpret_cast<float*>(workspace + squares_bytes);
    for (size_t first = 0; first < plan.positions.size(); first += Table::capacity) {
      table.count = static_cast<int>(std::min<size_t>(Table::capacity, plan.positions.size() - first));
      std::copy_n(plan.positions.begin() + first, table.count, table.positions);
      launch_table<Tile>(table, products, threads, shared_bytes);
    }
  }

  template <typename Tile>
  void launch_table(Table& table, void (*products)(Table), int threads, int shared_bytes) {
    constexpr int sum_blocks_of_a_tile = Tile::values / Tile::values_per_sum_block;
    int blocks = 0, sum_blocks = 0;
    bool several_squares = false;
    for (int l = 0; l < table.count; ++l) {
      Position& p = table.positions[l];
      p.first_block = blocks;
      p.first_sum_block = sum_blocks;
      blocks += p.tiles * p.splits;
      sum_blocks += p.splits > 1 ? p.tiles * sum_blocks_of_a_tile : 0;
      several_squares |= p.squares != 1;
    }
    if (blocks > 0) {
      device_.launch(products, blocks, threads, shared_bytes, table);
    }
    if (sum_blocks > 0) {
      device_.launch(&sum_splits<Tile>, sum_blocks, Tile::threads, 0, table);
    }
    if (table.norms != nullptr && several_squares) {
      constexpr int norm_threads = 128;
      device_.launch(&sum_norms<norm_threads>, table.count, norm_threads, 0, table);
    }
  }

  const Call& call_;
  Device& device_;
};

}  // namespace growkernels::virtual_grad::cuda
