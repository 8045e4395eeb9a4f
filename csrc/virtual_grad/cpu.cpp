// G_l = A_l B_l for all positions l at once, where A is the (masked) gradient transposed and B the
// (activated) input, both [samples, width]. One pass: samples are loaded in chunks, a tile of G stays
// in L2 while it sums them, and its norm is taken before it leaves the cache, so norms never write G.
//
// Work is cut into items (tile of G, range of samples) of all positions together, which threads take
// from one queue. Sums over several items of a tile are added in a fixed order by whichever thread
// finishes the tile, so results do not depend on the schedule.

#include "common/gemm_tile.h"
#include "virtual_grad/cpu_pack.h"
#include "virtual_grad/virtual_grad.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

namespace growkernels::virtual_grad {
namespace {

// Measured on Zen 4 (1 MiB of L2 per core), float32: a tile of 384 x 384 and chunks of 128 samples.
constexpr int64_t tile_rows = 384;
constexpr int64_t tile_columns = 384;
constexpr int64_t chunk_elements = 128 * 384;
constexpr int64_t max_chunk = 2048;
constexpr int64_t serial_below_products = 1 << 20;  // starting threads costs more than this much work

enum class Store { Nothing, Write, Accumulate };

struct Position {
  at::Tensor h, g;  // [samples, width], rows contiguous
  void* gradient = nullptr;
  int64_t samples = 0, width = 0;
};

struct Tile {
  int64_t position, row, rows, column, columns;
  int64_t items;        // ranges of samples that the sum is cut into
  int64_t partial = 0;  // offset of the first range's sums in the scratch, when items > 1
  double squares = 0, batch_squares = 0;
};

struct Item {
  int64_t tile, index, begin, end;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Item> items;
  int64_t partial_elements = 0;
  bool parallel = false;
};

// Samples that one product sums over: the widest operand's chunk stays well inside L2.
int64_t chunk_of(const Position& position) {
  const int64_t widest = std::max<int64_t>(1, std::min(position.width, tile_rows));
  return std::clamp<int64_t>(chunk_elements / widest / 32 * 32, 32, max_chunk);
}

Plan make_plan(const std::vector<Position>& positions) {
  Plan plan;
  int64_t total = 0;
  for (const Position& p : positions) {
    total += p.samples * p.width * p.width;
  }
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  plan.parallel = threads > 1 && total > serial_below_products;
  const int64_t largest_item = plan.parallel ? std::max<int64_t>(1, total / (4 * threads)) : total;
  for (size_t l = 0; l < positions.size(); ++l) {
    const Position& p = positions[l];
    const int64_t chunk = chunk_of(p);
    for (int64_t row = 0; row < p.width; row += tile_rows) {
      for (int64_t column = 0; column < p.width; column += tile_columns) {
        Tile tile{static_cast<int64_t>(l),
                  row,
                  std::min(tile_rows, p.width - row),
                  column,
                  std::min(tile_columns, p.width - column),
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
        if (tile.items > 1) {
          tile.partial = plan.partial_elements;
          plan.partial_elements += tile.items * tile.rows * tile.columns;
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

template <typename T>
class Scratch {
 public:
  T* at_least(int64_t count) {
    if (count > count_) {
      memory_ = c10::GetCPUAllocator()->allocate(count * sizeof(T));
      count_ = count;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  at::DataPtr memory_;
  int64_t count_ = 0;
};

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
      : positions_(positions), kind_(kind), store_(store), plan_(make_plan(positions)) {
    partials_.at_least(plan_.partial_elements);
    unfinished_ = std::make_unique<std::atomic<int64_t>[]>(plan_.tiles.size());
    for (size_t t = 0; t < plan_.tiles.size(); ++t) {
      unfinished_[t] = plan_.tiles[t].items;
    }
  }

  // Fills in squares and batch_squares of every tile, and the gradients where they are stored.
  const std::vector<Tile>& run() {
    const int64_t workers = plan_.parallel ? at::get_num_threads() : 1;
    std::atomic<size_t> next{0};
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        Buffers buffers;
        for (size_t i = next++; i < plan_.items.size(); i = next++) {
          run_item(plan_.items[i], buffers);
        }
        if constexpr (interleaved) {
          release_tiles();
        }
      }
    });
    return plan_.tiles;
  }

 private:
  struct Buffers {
    Scratch<Operand> a, b;
    Scratch<Acc> activated, sums;
  };

  void run_item(const Item& item, Buffers& buffers) {
    Tile& tile = plan_.tiles[item.tile];
    const int64_t elements = tile.rows * tile.columns;
    Acc* sums =
        tile.items > 1 ? partials_.at_least(0) + tile.partial + item.index * elements : buffers.sums.at_least(elements);
    sum_products(item, tile, buffers, sums);
    if (--unfinished_[item.tile] > 0) {
      return;
    }
    if (tile.items > 1) {
      sums = partials_.at_least(0) + tile.partial;
      for (int64_t i = 1; i < tile.items; ++i) {
        for (int64_t e = 0; e < elements; ++e) {
          sums[e] += sums[i * elements + e];
        }
      }
    }
    finish(tile, sums);
  }

  void sum_products(const Item& item, const Tile& tile, Buffers& buffers, Acc* sums) {
    const Position& p = positions_[tile.position];
    const int64_t chunk = chunk_of(p);
    const int64_t g_stride = p.g.stride(0), h_stride = p.h.stride(0);
    const In* g = p.g.const_data_ptr<In>() + tile.row;
    const In* mask = p.h.const_data_ptr<In>() + tile.row;
    const In* h = p.h.const_data_ptr<In>() + tile.column;
    Operand* a = buffers.a.at_least(tile.rows * (std::min(chunk, item.end - item.begin) + 1));
    if (item.begin == item.end) {
      std::fill_n(sums, tile.rows * tile.columns, Acc(0));
    }
    for (int64_t m = item.begin; m < item.end; m += chunk) {
      const int64_t depth = std::min(chunk, item.end - m);
      const int64_t padded_depth = interleaved ? (depth + 1) / 2 * 2 : depth;
      if (kind_.layer == Layer::LinearRelu) {
        widest<PackGradient<In, Operand, true>>(g + m * g_stride, g_stride, mask + m * h_stride, h_stride, depth,
                                                padded_depth, tile.rows, a);
      } else {
        widest<PackGradient<In, Operand, false>>(g + m * g_stride, g_stride, mask + m * h_stride, h_stride, depth,
                                                 padded_depth, tile.rows, a);
      }
      const auto [b, ldb] = load_input(h + m * h_stride, h_stride, depth, tile.columns, buffers);
      multiply_tile(tile.rows, tile.columns, padded_depth, a, padded_depth, b, ldb, sums, tile.columns, m > item.begin);
    }
  }

  // The second operand and its row stride: the tensor itself where it can be used as it is.
  std::pair<const Operand*, int64_t> load_input(const In* h, int64_t stride, int64_t depth, int64_t columns,
                                                Buffers& buffers) {
    if (kind_.layer == Layer::Residual) {
      Acc* activated = buffers.activated.at_least(depth * columns);
      widest<Widen<In, Acc>>(h, stride, depth, columns, static_cast<Acc>(kind_.scale), activated);
      activate_in_place(activated, depth * columns, kind_.activation);
      if constexpr (interleaved) {
        Operand* b = buffers.b.at_least((depth + 1) * columns);
        widest<InterleaveRows<Acc>>(activated, columns, depth, columns, b);
        return {b, columns};
      } else {
        return {activated, columns};
      }
    }
    if constexpr (interleaved) {
      Operand* b = buffers.b.at_least((depth + 1) * columns);
      widest<InterleaveRows<In>>(h, stride, depth, columns, b);
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
    double squares = 0;
    for (int64_t i = 0; i < tile.rows; ++i) {
      Acc* target = gradient + i * width;
      const Acc* source = sums + i * tile.columns;
      if (store_ == Store::Write) {
        std::copy_n(source, tile.columns, target);
      } else {
        for (int64_t j = 0; j < tile.columns; ++j) {
          target[j] += source[j];
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
  Scratch<Acc> partials_;
  std::unique_ptr<std::atomic<int64_t>[]> unfinished_;
};

std::vector<Tile> run_kernel(std::vector<Position>& positions, const Kind& kind, Store store) {
  const at::ScalarType dtype = positions[0].h.scalar_type();
  switch (dtype) {
    case at::kDouble:
      return Kernel<double, double>(positions, kind, store).run();
    case at::kFloat:
      return Kernel<float, float>(positions, kind, store).run();
    case at::kHalf:
      return Kernel<at::Half, float>(positions, kind, store).run();
    case at::kBFloat16:
      if (brgemm_available(at::kBFloat16)) {
        return Kernel<at::BFloat16, at::BFloat16>(positions, kind, store).run();
      }
      return Kernel<at::BFloat16, float>(positions, kind, store).run();
    default:
      TORCH_CHECK_TYPE(false, "virtual_grad: no CPU kernel for dtype ", dtype);
  }
}

// [samples, width] with contiguous rows: a view where the strides allow it.
at::Tensor as_rows(const at::Tensor& x) {
  const at::Tensor rows = x.dim() == 2 ? x : x.flatten(0, -2);
  const bool usable = (rows.size(1) <= 1 || rows.stride(1) == 1) && rows.stride(0) >= rows.size(1);
  return usable ? rows : rows.contiguous();
}

std::vector<Position> positions_of(at::TensorList inputs, at::TensorList grads) {
  std::vector<Position> positions(inputs.size());
  for (size_t l = 0; l < inputs.size(); ++l) {
    Position& p = positions[l];
    p.h = as_rows(inputs[l]);
    p.g = as_rows(grads[l]);
    p.samples = p.h.size(0);
    p.width = p.h.size(1);
  }
  return positions;
}

at::Tensor sum_over_tiles(const std::vector<Tile>& tiles, size_t positions, double Tile::* value,
                          at::ScalarType dtype) {
  std::vector<double> sums(positions);
  for (const Tile& tile : tiles) {
    sums[tile.position] += tile.*value;
  }
  at::Tensor out = at::empty({static_cast<int64_t>(positions)}, at::TensorOptions().dtype(dtype));
  if (dtype == at::kDouble) {
    std::copy(sums.begin(), sums.end(), out.mutable_data_ptr<double>());
  } else {
    std::copy(sums.begin(), sums.end(), out.mutable_data_ptr<float>());
  }
  return out;
}

// Positions are added up side by side, so two of them must not share memory.
void check_separate(at::TensorList sums) {
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const at::Tensor& sum : sums) {
    const char* begin = static_cast<const char*>(sum.const_data_ptr());
    ranges.emplace_back(begin, begin + sum.nbytes());
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    TORCH_CHECK_VALUE(ranges[i - 1].second <= ranges[i].first,
                      "virtual_grads: two of the buffers to accumulate into share memory; pass one of its own "
                      "for every position and add those of tied layers afterwards");
  }
}

at::Tensor virtual_grad_norms(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                              c10::string_view activation, double scale) {
  const Kind kind = parse_kind(layer, activation, scale);
  check_positions("virtual_grad_norms", inputs, grads, kind);
  if (kind.layer == Layer::Conv2dRelu) {
    return aten_gradient_norms(inputs, grads, kind);
  }
  std::vector<Position> positions = positions_of(inputs, grads);
  return sum_over_tiles(run_kernel(positions, kind, Store::Nothing), positions.size(), &Tile::squares,
                        gradient_dtype(inputs[0].scalar_type()));
}

std::vector<at::Tensor> virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                      c10::string_view activation, double scale) {
  const Kind kind = parse_kind(layer, activation, scale);
  check_positions("virtual_grads", inputs, grads, kind);
  if (kind.layer == Layer::Conv2dRelu) {
    return aten_gradients(inputs, grads, kind);
  }
  std::vector<Position> positions = positions_of(inputs, grads);
  std::vector<at::Tensor> gradients;
  for (Position& p : positions) {
    gradients.push_back(at::empty({p.width, p.width}, p.h.options().dtype(gradient_dtype(p.h.scalar_type()))));
    p.gradient = gradients.back().data_ptr();
  }
  run_kernel(positions, kind, Store::Write);
  return gradients;
}

at::Tensor accumulate_virtual_grads(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                                    c10::string_view activation, double scale, at::TensorList sums,
                                    const std::optional<at::Tensor>& second_moments) {
  const Kind kind = parse_kind(layer, activation, scale);
  check_positions("virtual_grads", inputs, grads, kind);
  check_sums(inputs, sums, second_moments, kind);
  if (kind.layer == Layer::Conv2dRelu) {
    return aten_accumulate(inputs, grads, kind, sums, second_moments);
  }
  check_separate(sums);
  std::vector<Position> positions = positions_of(inputs, grads);
  for (size_t l = 0; l < positions.size(); ++l) {
    positions[l].gradient = sums[l].data_ptr();
  }
  const std::vector<Tile> tiles = run_kernel(positions, kind, Store::Accumulate);
  const at::ScalarType dtype = gradient_dtype(inputs[0].scalar_type());
  if (second_moments.has_value()) {
    second_moments->add_(sum_over_tiles(tiles, positions.size(), &Tile::batch_squares, dtype));
  }
  return sum_over_tiles(tiles, positions.size(), &Tile::squares, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CPU, m) {
  m.impl("virtual_grads", &virtual_grads);
  m.impl("virtual_grad_norms", &virtual_grad_norms);
  m.impl("accumulate_virtual_grads", &accumulate_virtual_grads);
}

}  // namespace growkernels::virtual_grad
