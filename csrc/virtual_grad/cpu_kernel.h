#pragma once
// G_l = A_l B_l for all positions l at once, where A is the (masked) gradient [samples, height] transposed
// and B the (activated) input [samples, width]. One pass: samples are loaded in chunks, a tile of G stays
// in L2 while it sums them, and its norm is taken before it leaves the cache, so norms never write G.
//
// Work is cut into items (tile of G, range of samples) of all positions together, which threads take
// from one queue.

#include "common/gemm_tile.h"
#include "common/scratch.h"
#include "common/work_queue.h"
#include "virtual_grad/cpu_pack.h"
#include "virtual_grad/cpu_plan.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace growkernels::virtual_grad {

template <typename Acc>
double sum_of_squares(const Acc* x, int64_t count) {
  constexpr int64_t lanes = 16;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int64_t q = 0; q < lanes; ++q) {
      const double value = x[i + q];
      sums[q] += value * value;
    }
  }
  for (; i < count; ++i) {
    const double value = x[i];
    sums[0] += value * value;
  }
  return std::accumulate(sums, sums + lanes, 0.0);
}

// In: dtype of the tensors. Operand: dtype that tiles are multiplied in.
template <typename In, typename Operand>
class Kernel {
  using Acc = accumulate_t<In>;
  static constexpr bool interleaved = std::is_same_v<Operand, at::BFloat16>;

 public:
  Kernel(std::vector<Position>& positions, const Kind& kind, Store store)
      : positions_(positions), kind_(kind), store_(store), plan_(make_plan(positions)), sums_(plan_.tiles.size()) {
    for (const Tile& tile : plan_.tiles) {
      sums_.add(tile.items, tile.rows * tile.columns);
    }
    sums_.begin();
  }

  // Fills in squares and batch_squares of every tile, and the gradients where they are stored.
  const std::vector<Tile>& run() {
    take_from_queue(
        plan_.items, plan_.parallel, [] { return Buffers(); },
        [&](const Item& item, Buffers& buffers) { run_item(item, buffers); });
    return plan_.tiles;
  }

 private:
  struct Buffers {
    Scratch<Operand> a, b;
    Scratch<Acc> activated, sums;

    ~Buffers() {
      if constexpr (interleaved) {
        release_bfloat16_tiles();
      }
    }
  };

  void run_item(const Item& item, Buffers& buffers) {
    Tile& tile = plan_.tiles[item.tile];
    Acc* const part = sums_.part(item.tile, item.index);
    Acc* const sums = part != nullptr ? part : buffers.sums.at_least(tile.rows * tile.columns);
    sum_products(item, tile, buffers, sums);
    if (sums_.complete(item.tile)) {
      finish(tile, part != nullptr ? sums_.part(item.tile, 0) : sums);
    }
  }

  void sum_products(const Item& item, const Tile& tile, Buffers& buffers, Acc* sums) {
    const Position& p = positions_[tile.position];
    const int64_t chunk = chunk_of(p);
    const int64_t g_stride = p.g.stride(0), h_stride = p.h.stride(0);
    const In* g = p.g.const_data_ptr<In>() + tile.row;
    const In* mask = p.h.const_data_ptr<In>() + tile.row;
    const In* h = p.h.const_data_ptr<In>() + tile.column;
    const bool masked = kind_.layer == Layer::LinearRelu;
    Operand* a = buffers.a.at_least(tile.rows * padded_depth<Operand>(std::min(chunk, item.end - item.begin)));
    if (item.begin == item.end) {
      std::fill_n(sums, tile.rows * tile.columns, Acc(0));
    }
    for (int64_t m = item.begin; m < item.end; m += chunk) {
      const int64_t depth = std::min(chunk, item.end - m);
      const auto [b, ldb] = load_input(h + m * h_stride, h_stride, depth, tile.columns, buffers);
      if constexpr (interleaved) {
        const int64_t padded = padded_depth<Operand>(depth);
        const auto pack = [&](auto gradient) {
          widest<Transpose<decltype(gradient)>>(gradient, depth, padded, tile.rows, a);
        };
        if (masked) {
          pack(Gradient<In, Operand, true>{g + m * g_stride, g_stride, mask + m * h_stride, h_stride});
        } else {
          pack(Gradient<In, Operand, false>{g + m * g_stride, g_stride, nullptr, 0});
        }
        multiply_tile(tile.rows, tile.columns, padded, a, padded, b, ldb, sums, tile.columns, m > item.begin);
      } else {
        note(Ran::Portable);
        const Rows<Operand> left =
            load_gradient(g + m * g_stride, g_stride, masked ? mask + m * h_stride : nullptr, h_stride, depth, tile, a);
        if (tile.upright) {
          portable_transposed_tile(tile.columns, tile.rows, depth, b, ldb, left.data, left.stride, sums, tile.rows,
                                   m > item.begin);
        } else {
          portable_transposed_tile(tile.rows, tile.columns, depth, left.data, left.stride, b, ldb, sums, tile.columns,
                                   m > item.begin);
        }
      }
    }
  }

  // The first operand as it lies, masked where `mask` is not null. In place where it can be and is read few times:
  // products read a few columns at a time, and where rows lie far apart these meet in few sets of the caches.
  Rows<Operand> load_gradient(const In* g, int64_t stride, const In* mask, int64_t mask_stride, int64_t depth,
                              const Tile& tile, Operand* packed) {
    constexpr int64_t read_few_times = 2 * 64 / sizeof(Operand);  // columns
    if (mask != nullptr) {
      using Masked = Gradient<In, Operand, true>;
      widest<KeepRows<Masked>>(Masked{g, stride, mask, mask_stride}, depth, tile.rows, packed);
    } else if (std::is_same_v<In, Operand> && std::min(tile.rows, tile.columns) <= read_few_times) {
      return {reinterpret_cast<const Operand*>(g), stride};
    } else {
      widest<Widen<In, Operand>>(g, stride, depth, tile.rows, Operand(1), packed);
    }
    return {packed, tile.rows};
  }

  // The second operand: the tensor itself where it can be used as it is.
  Rows<Operand> load_input(const In* h, int64_t stride, int64_t depth, int64_t columns, Buffers& buffers) {
    if (kind_.layer == Layer::Residual) {
      Acc* activated = buffers.activated.at_least(depth * columns);
      widest<Widen<In, Acc>>(h, stride, depth, columns, static_cast<Acc>(kind_.scale), activated);
      activate_in_place(activated, depth * columns, kind_.activation);
      if constexpr (interleaved) {
        const int64_t padded = padded_depth<Operand>(depth);
        Operand* b = buffers.b.at_least(padded * columns);
        widest<InterleaveRows<Acc>>(activated, columns, depth, padded, columns, b);
        return {b, columns};
      } else {
        return {activated, columns};
      }
    }
    if constexpr (interleaved) {
      const int64_t padded = padded_depth<Operand>(depth);
      Operand* b = buffers.b.at_least(padded * columns);
      widest<InterleaveRows<In>>(h, stride, depth, padded, columns, b);
      return {b, columns};
    } else if constexpr (std::is_same_v<In, Operand>) {
      return {h, stride};
    } else {
      Operand* b = buffers.b.at_least(depth * columns);
      widest<Widen<In, Operand>>(h, stride, depth, columns, Operand(1), b);
      return {b, columns};
    }
  }

  void finish(Tile& tile, const Acc* sums) {
    const int64_t width = positions_[tile.position].width;
    tile.batch_squares = sum_of_squares(sums, tile.rows * tile.columns);
    tile.squares = tile.batch_squares;
    if (store_ == Store::Nothing) {
      return;
    }
    Acc* gradient = static_cast<Acc*>(positions_[tile.position].gradient) + tile.row * width + tile.column;
    const int64_t row_stride = tile.upright ? 1 : tile.columns, column_stride = tile.upright ? tile.rows : 1;
    double squares = 0;
    for (int64_t i = 0; i < tile.rows; ++i) {
      Acc* target = gradient + i * width;
      const Acc* source = sums + i * row_stride;
      if (store_ == Store::Write) {
        for (int64_t j = 0; j < tile.columns; ++j) {
          target[j] = source[j * column_stride];
        }
      } else {
        for (int64_t j = 0; j < tile.columns; ++j) {
          target[j] += source[j * column_stride];
        }
        squares += sum_of_squares(target, tile.columns);
      }
    }
    if (store_ == Store::Accumulate) {
      tile.squares = squares;
    }
  }

  std::vector<Position>& positions_;
  const Kind kind_;
  const Store store_;
  Plan plan_;
  OrderedSums<Acc> sums_;  // one for every tile
};

// Compiled in files of their own, by width of the tensors' elements.
std::vector<Tile> run_wide_kernel(std::vector<Position>& positions, const Kind& kind, Store store);
std::vector<Tile> run_16_bit_kernel(std::vector<Position>& positions, const Kind& kind, Store store);
// Of float32 positions that are rounded to bfloat16.
std::vector<Tile> run_rounded_kernel(std::vector<Position>& positions, const Kind& kind, Store store);

}  // namespace growkernels::virtual_grad
