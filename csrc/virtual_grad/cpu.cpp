// The ops on the CPU: arguments in, the kernel of the right element type, results out.

#include "common/float32_products.h"
#include "common/kernels_ran.h"
#include "virtual_grad/cpu_kernel.h"
#include "virtual_grad/cpu_winograd.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/threshold_backward.h>

#include <numeric>

namespace growkernels::virtual_grad {
namespace {

// Beyond Winograd's reach the vendor's weight gradient is at the machine's peak already.
at::Tensor convolution_gradient(const at::Tensor& h, const at::Tensor& g, const Kind& kind) {
  return winograd_obstacle(h) == nullptr ? winograd_gradient(h, g) : aten_gradient(h, g, kind);
}

double squared_norm(const at::Tensor& matrix) {
  std::vector<double> rows(matrix.size(0));
  AT_DISPATCH_FLOATING_TYPES(matrix.scalar_type(), "virtual_grad", [&] {
    const auto* data = matrix.const_data_ptr<scalar_t>();
    at::parallel_for(0, matrix.size(0), 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        rows[i] = sum_of_squares(data + i * matrix.size(1), matrix.size(1));
      }
    });
  });
  return std::accumulate(rows.begin(), rows.end(), 0.0);
}

constexpr int64_t masked_rows_at_a_time = 4096;  // whose masked gradients stay in cache

void multiply_by_vendor(const Position& p, const Kind& kind, at::Tensor& product) {
  if (kind.layer == Layer::Linear) {
    at::mm_out(product, p.g.t(), p.h);
    return;
  }
  int64_t first = 0;
  do {
    const int64_t count = std::min(masked_rows_at_a_time, p.samples - first);
    at::Tensor h = p.h.narrow(0, first, count), g = p.g.narrow(0, first, count);
    if (kind.layer == Layer::LinearRelu) {
      g = at::threshold_backward(g, h, 0);
    } else {
      h = activate(h, kind);
    }
    first == 0 ? at::mm_out(product, g.t(), h) : product.addmm_(g.t(), h);
    first += count;
  } while (first < p.samples);
}

// One position after the other, each as one tile; what is not stored is written over by the next.
std::vector<Tile> run_vendors_product(const std::vector<Position>& positions, const Kind& kind, Store store) {
  note(Ran::VendorsProduct);
  std::vector<Tile> tiles;
  at::Tensor product;
  for (const Position& p : positions) {
    at::Tensor stored;
    if (store != Store::Nothing) {
      stored = at::from_blob(p.gradient, {p.height, p.width}, p.h.options());
    }
    if (store == Store::Write || !product.defined() || product.size(0) != p.height || product.size(1) != p.width) {
      product = store == Store::Write ? stored : at::empty({p.height, p.width}, p.h.options());
    }
    multiply_by_vendor(p, kind, product);
    Tile tile{static_cast<int64_t>(tiles.size()), 0, p.height, 0, p.width, false, 1};
    tile.squares = tile.batch_squares = squared_norm(product);
    if (store == Store::Accumulate) {
      stored.add_(product);
      tile.squares = squared_norm(stored);
    }
    tiles.push_back(tile);
  }
  return tiles;
}

// Positions of one list with their places in the call's.
struct Some {
  std::vector<Position> positions;
  std::vector<int64_t> places;
};

std::vector<Tile> run_kernel(const std::vector<Position>& positions, const Kind& kind, Store store) {
  Some some[3];  // those that are rounded, and the vendor's, are apart
  for (size_t l = 0; l < positions.size(); ++l) {
    Some& of_its_kind = some[positions[l].vendors ? 2 : positions[l].rounded];
    of_its_kind.positions.push_back(positions[l]);
    of_its_kind.places.push_back(static_cast<int64_t>(l));
  }
  std::vector<Tile> all;
  for (auto& [part, places] : some) {
    if (part.empty()) {
      continue;
    }
    std::vector<Tile> tiles = part[0].vendors                 ? run_vendors_product(part, kind, store)
                              : part[0].rounded               ? run_rounded_kernel(part, kind, store)
                              : part[0].h.element_size() == 2 ? run_16_bit_kernel(part, kind, store)
                                                              : run_wide_kernel(part, kind, store);
    for (Tile& tile : tiles) {
      tile.position = places[tile.position];
      all.push_back(tile);
    }
  }
  return all;
}

std::vector<Position> positions_of(const Positions& call, const Kind& kind) {
  std::vector<Position> positions(call.inputs.size());
  const bool rounds = call.inputs[0].scalar_type() == at::kFloat && rounded_float32_obstacle() == nullptr;
  for (size_t l = 0; l < positions.size(); ++l) {
    Position& p = positions[l];
    p.h = as_rows(call.inputs[l]);
    p.g = as_rows(call.grads[l]);
    p.samples = p.h.size(0);
    p.width = p.h.size(1);
    p.height = p.g.size(1);
    p.rounded = rounds && tiles_obstacle(at::kFloat, p.height, p.width) == nullptr;
    p.vendors = !p.rounded && vendor_obstacle(p.h.scalar_type(), kind, p.height, p.width) == nullptr;
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

at::Tensor norms(const Positions& call, const Kind& kind) {
  if (kind.layer == Layer::Conv2dRelu) {
    return norms_one_by_one(call, kind, convolution_gradient);
  }
  std::vector<Position> positions = positions_of(call, kind);
  return sum_over_tiles(run_kernel(positions, kind, Store::Nothing), positions.size(), &Tile::squares,
                        gradient_dtype(call.inputs[0].scalar_type()));
}

Gradients gradients(const Positions& call, const Kind& kind) {
  if (kind.layer == Layer::Conv2dRelu) {
    return gradients_one_by_one(call, kind, convolution_gradient);
  }
  std::vector<Position> positions = positions_of(call, kind);
  Gradients out;
  for (Position& p : positions) {
    out.push_back(at::empty({p.height, p.width}, p.h.options().dtype(gradient_dtype(p.h.scalar_type()))));
    p.gradient = out.back().data_ptr();
  }
  run_kernel(positions, kind, Store::Write);
  return out;
}

at::Tensor accumulate(const Accumulation& call, const Kind& kind) {
  if (kind.layer == Layer::Conv2dRelu) {
    return accumulate_one_by_one(call, kind, convolution_gradient);
  }
  std::vector<Position> positions = positions_of(call, kind);
  for (size_t l = 0; l < positions.size(); ++l) {
    positions[l].gradient = call.sums[l].data_ptr();
  }
  const std::vector<Tile> tiles = run_kernel(positions, kind, Store::Accumulate);
  const at::ScalarType dtype = gradient_dtype(call.inputs[0].scalar_type());
  if (call.second_moments.has_value()) {
    call.second_moments->add_(sum_over_tiles(tiles, positions.size(), &Tile::batch_squares, dtype));
  }
  return sum_over_tiles(tiles, positions.size(), &Tile::squares, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CPU, m) { implement<checked<gradients>, checked<norms>, checked<accumulate>>(m); }

}  // namespace growkernels::virtual_grad
