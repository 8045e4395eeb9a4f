// The ops on the CPU: arguments in, the kernel of the right element type, results out.

#include "virtual_grad/cpu_kernel.h"
#include "virtual_grad/cpu_winograd.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace growkernels::virtual_grad {
namespace {

// Beyond Winograd's reach the vendor's weight gradient is at the machine's peak already.
at::Tensor convolution_gradient(const at::Tensor& h, const at::Tensor& g, const Kind& kind) {
  return winograd_obstacle(h) == nullptr ? winograd_gradient(h, g) : aten_gradient(h, g, kind);
}

std::vector<Tile> run_kernel(std::vector<Position>& positions, const Kind& kind, Store store) {
  return positions[0].h.element_size() == 2 ? run_16_bit_kernel(positions, kind, store)
                                            : run_wide_kernel(positions, kind, store);
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

at::Tensor virtual_grad_norms(at::TensorList inputs, at::TensorList grads, c10::string_view layer,
                              c10::string_view activation, double scale) {
  const Kind kind = parse_kind(layer, activation, scale);
  check_positions("virtual_grad_norms", inputs, grads, kind);
  if (kind.layer == Layer::Conv2dRelu) {
    return aten_gradient_norms(inputs, grads, kind, convolution_gradient);
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
    return aten_gradients(inputs, grads, kind, convolution_gradient);
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
    return aten_accumulate(inputs, grads, kind, sums, second_moments, convolution_gradient);
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
