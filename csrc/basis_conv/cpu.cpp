// basis_conv2d and its backward pass on the CPU: our kernels for bfloat16 and float32, the vendor's for the rest.

#include "basis_conv/basis_conv.h"
#include "basis_conv/cpu_mix.h"
#include "basis_conv/cpu_tiles.h"
#include "basis_conv/plan.h"
#include "common/huge_pages.h"
#include "common/kernels_ran.h"
#include "common/vector_width.h"
#include "common/workspace.h"
#include "convolution/layout.h"
#include "convolution/winograd.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace growkernels::basis_conv {

using namespace convolution;

namespace {

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;

at::Tensor fresh(const at::Tensor& like, at::IntArrayRef shape) {
  const at::Tensor tensor = at::empty(shape, like.options().memory_format(channels_last));
  advise_huge_pages(tensor);
  return tensor;
}

// Results lie in channels_last order until here, or come from the vendor in some order.
at::Tensor arranged(const at::Tensor& images, at::MemoryFormat format) {
  const bool convert = format == at::MemoryFormat::Contiguous && images.element_size() <= 4;
  return laid_out(convert ? to_contiguous(images) : images, format);
}

Images<float> mutable_images(const at::Tensor& tensor, int64_t channels) {
  return {tensor.mutable_data_ptr<float>(), tensor.size(0), tensor.size(2), tensor.size(3), channels, tensor.size(1)};
}

// Turned around by half a turn, from the maps to the input.
Kernels<const float> input_gradient_kernels(const at::Tensor& basis) {
  const float* last = basis.const_data_ptr<float>() + 2 * basis.stride(2) + 2 * basis.stride(3);
  return {last, basis.size(1), basis.size(0), basis.stride(1), basis.stride(0), -basis.stride(2), -basis.stride(3)};
}

struct AddRow {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const float* row, int64_t rows, int64_t columns, float* x) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        x[i * columns + j] += row[j];
      }
    }
  }
};

// y and z of a forward pass, and what turns pixels of z into pixels of y.
struct Outputs {
  at::Tensor y, z;  // both channels_last; z is a part of y when include_basis
  at::Tensor coeff_transposed;
  OptionalTensor bias;
  int64_t maps, mixed_channels;

  explicit Outputs(const Forward& call)
      : coeff_transposed(call.coeff.t().contiguous()), maps(call.basis.size(0)), mixed_channels(call.coeff.size(0)) {
    const auto& [x, basis, coeff, bias, form] = call;
    const auto concrete = [](const c10::SymDimVector& shape) { return C10_AS_INTARRAYREF_SLOW(shape); };
    y = fresh(x, concrete(output_shape(x, basis, coeff, form)));
    z = form.include_basis ? y.narrow(1, 0, maps) : fresh(x, concrete(maps_shape(x, basis, form)));
    if (bias.has_value()) {
      this->bias = bias->contiguous();
    }
  }

  Images<float> maps_images() const {
    Images<float> result = mutable_images(y, maps);
    result.data = z.mutable_data_ptr<float>();
    result.pixel_stride = maps + (z.is_alias_of(y) ? mixed_channels : 0);
    return result;
  }

  // body(first, count) on the threads, for blocks of pixels small enough for a cache.
  template <typename Body>
  void for_each_block(const Body& body) const {
    constexpr int64_t block = 128;
    const int64_t pixels = y.size(0) * y.size(2) * y.size(3);
    at::parallel_for(0, at::divup(pixels, block), 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * block; first < std::min(end * block, pixels); first += block) {
        body(first, std::min(block, pixels - first));
      }
    });
  }

  // The maps of these pixels lie at `source`: in z itself or elsewhere.
  void mix(int64_t first, int64_t count, const float* source, int64_t source_stride) const {
    const int64_t channels = y.size(1);
    float* const pixels = y.mutable_data_ptr<float>() + first * channels;
    mix_pixels(count, source, source_stride, maps, coeff_transposed.const_data_ptr<float>(), mixed_channels,
               pixels + channels - mixed_channels, channels);
    if (bias.has_value()) {
      widest<AddRow>(bias->const_data_ptr<float>(), count, channels, pixels);
    }
  }
};

void winograd_forward(const Forward& call, const Outputs& outputs) {
  note(Ran::Winograd);
  const auto& [x, basis, coeff, bias, form] = call;
  const at::Tensor input = with_adjacent_channels(x);
  const Images<float> z = outputs.maps_images();
  winograd_convolution(images(input), kernels_like(basis, basis.const_data_ptr<float>()), form.padding[0].expect_int(),
                       form.padding[1].expect_int(), z, [&](int64_t first, int64_t count) {
                         outputs.mix(first, count, z.data + first * z.pixel_stride, z.pixel_stride);
                       });
}

void direct_forward(const Forward& call, const Outputs& outputs) {
  note(Ran::Direct);
  const auto& [x, basis, coeff, bias, form] = call;
  const at::Tensor maps =
      at::conv2d_symint(x, basis, std::nullopt, form.stride, form.padding, form.dilation).contiguous(channels_last);
  const float* const source = maps.const_data_ptr<float>();
  const Images<float> z = outputs.maps_images();
  outputs.for_each_block([&](int64_t first, int64_t count) {
    for (int64_t p = first; p < first + count; ++p) {
      std::copy_n(source + p * z.channels, z.channels, z.data + p * z.pixel_stride);
    }
    outputs.mix(first, count, source + first * z.channels, z.channels);
  });
}

void pointwise_forward(const Forward& call, const Outputs& outputs) {
  note(Ran::Pointwise);
  const at::Tensor input = with_adjacent_channels(call.x);
  const at::Tensor basis_transposed = call.basis.flatten(1).t().contiguous();
  const Images<const float> pixels = images(input);
  const Images<float> z = outputs.maps_images();
  outputs.for_each_block([&](int64_t first, int64_t count) {
    float* const maps = z.data + first * z.pixel_stride;
    mix_pixels(count, pixels.data + first * pixels.pixel_stride, pixels.pixel_stride, pixels.channels,
               basis_transposed.const_data_ptr<float>(), z.channels, maps, z.pixel_stride);
    outputs.mix(first, count, maps, z.pixel_stride);
  });
}

// dx = dz basis and dbasis = dz^T x: a mix of the maps' gradients, and its coefficients' gradient.
void pointwise_backward(const at::Tensor& dz, const at::Tensor& x, const at::Tensor& basis, const at::Tensor& dx,
                        const at::Tensor& dbasis) {
  note(Ran::Pointwise);
  const Images<const float> gradient = images(dz);
  if (dx.defined()) {
    const at::Tensor coeff_transposed = basis.flatten(1).contiguous();
    const Images<float> out = mutable_images(dx, x.size(1));
    constexpr int64_t grain = 1024;
    at::parallel_for(0, gradient.pixels(), grain, [&](int64_t begin, int64_t end) {
      mix_pixels(end - begin, gradient.data + begin * gradient.channels, gradient.channels, gradient.channels,
                 coeff_transposed.const_data_ptr<float>(), out.channels, out.data + begin * out.channels, out.channels);
    });
  }
  if (dbasis.defined()) {
    const at::Tensor input = with_adjacent_channels(x);
    const Images<const float> pixels = images(input);
    MixBackward call{};
    call.pixels = gradient.pixels();
    call.maps = pixels.channels;
    call.mixed_channels = gradient.channels;
    call.mixed = gradient.data;
    call.grad_stride = gradient.channels;
    call.z = pixels.data;
    call.z_stride = pixels.pixel_stride;
    call.dcoeff = dbasis.mutable_data_ptr<float>();  // [R, Cin, 1, 1]: the same elements in any format
    mix_backward(call);
  }
}

// dx is laid out as x is before dbasis needs memory.
void winograd_backward(const at::Tensor& dz, const at::Tensor& x, const at::Tensor& basis, const Form& form,
                       at::Tensor& dx, const at::Tensor& dbasis) {
  note(Ran::Winograd);
  const int64_t pad_y = form.padding[0].expect_int(), pad_x = form.padding[1].expect_int();
  if (dx.defined()) {
    winograd_convolution(images(dz), input_gradient_kernels(basis), 2 - pad_y, 2 - pad_x, mutable_images(dx, x.size(1)),
                         [](int64_t, int64_t) {});
    dx = arranged(dx, x.suggest_memory_format());
  }
  if (dbasis.defined()) {
    const at::Tensor input = with_adjacent_channels(x);
    winograd_kernel_gradient(images(input), images(dz), pad_y, pad_x,
                             kernels_like(dbasis, dbasis.mutable_data_ptr<float>()));
  }
}

// Gradients of x and of the basis from that of the maps.
std::tuple<at::Tensor, at::Tensor> maps_backward(Algorithm algorithm, const at::Tensor& dz, const at::Tensor& x,
                                                 const at::Tensor& basis, const Form& form, Mask wanted) {
  at::Tensor dx, dbasis;
  if (algorithm == Algorithm::Direct) {
    note(Ran::Direct);
    const std::array<c10::SymInt, 2> no_output_padding = {0, 0};
    std::tie(dx, dbasis, std::ignore) =
        at::convolution_backward_symint(dz, x, basis, std::nullopt, form.stride, form.padding, form.dilation, false,
                                        no_output_padding, 1, {wanted[0], wanted[1], false});
    return {dx, dbasis};
  }
  if (wanted[0]) {
    dx = fresh(x, x.sizes());
  }
  if (wanted[1]) {
    dbasis = at::empty(basis.sizes(), basis.options().memory_format(basis.suggest_memory_format()));
  }
  if (algorithm == Algorithm::Pointwise) {
    pointwise_backward(dz, x, basis, dx, dbasis);
  } else {
    winograd_backward(dz, x, basis, form, dx, dbasis);
  }
  return {dx, dbasis};
}

struct MapsGradient;  // owner of a workspace

Gradients own_backward(Algorithm algorithm, const Backward& arguments) {
  const auto& [grad_in, x, basis, coeff_in, z_in, z_bias_in, form, wanted] = arguments;
  at::Tensor grad = to_channels_last(grad_in);
  const at::Tensor coeff = coeff_in.contiguous();
  const int64_t maps = basis.size(0), channels = grad.size(1), mixed = coeff.size(0);
  at::Tensor dx, dbasis, dcoeff, dbias, dz;

  MixBackward call{};
  call.pixels = grad.size(0) * grad.size(2) * grad.size(3);
  call.maps = maps;
  call.mixed_channels = mixed;
  call.top = form.include_basis ? grad.const_data_ptr<float>() : nullptr;
  call.mixed = grad.const_data_ptr<float>() + channels - mixed;
  call.grad_stride = channels;
  call.coeff = coeff.const_data_ptr<float>();
  if (wanted[0] || wanted[1]) {
    dz = workspace<MapsGradient>(call.pixels * maps)
             .narrow(0, 0, call.pixels * maps)
             .view({grad.size(0), grad.size(2), grad.size(3), maps})
             .permute({0, 3, 1, 2});
    call.dz = dz.mutable_data_ptr<float>();
  }
  at::Tensor z, z_bias;
  if (wanted[2]) {
    z = with_adjacent_channels(z_in);
    call.z = z.const_data_ptr<float>();
    call.z_stride = images(z).pixel_stride;
    if (z_bias_in.has_value()) {
      z_bias = z_bias_in->contiguous();
      call.z_bias = z_bias.const_data_ptr<float>();
    }
    dcoeff = at::empty(coeff.sizes(), coeff.options());
    call.dcoeff = dcoeff.mutable_data_ptr<float>();
  }
  mix_backward(call);
  if (wanted[3]) {
    dbias = grad.sum({0, 2, 3});
  }
  grad.reset();  // where it is a copy, its memory is free for the gradient of x

  if (dz.defined()) {
    std::tie(dx, dbasis) = maps_backward(algorithm, dz, x, basis, form, wanted);
  }
  return {dx, dbasis, dcoeff, dbias};
}

// 16-bit images without tiles are computed in float32. oneDNN's convolutions of them are wrong or crash for some odd
// channels, narrow images and wide paddings, have no fast backward pass in float16, and are generated anew and kept
// for every shape.
bool widened(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& coeff, const Form& form) {
  return x.element_size() == 2 && choose_algorithm(at::kCPU, x, basis, coeff, form) != Algorithm::Tiles;
}

at::Tensor as_float(const at::Tensor& tensor) { return tensor.to(at::kFloat); }

OptionalTensor as_float(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->to(at::kFloat)) : std::nullopt;
}

WithMaps compute(const Forward& call, bool maps_wanted) {
  if (widened(call.x, call.basis, call.coeff, call.form)) {
    const at::Tensor x = as_float(call.x), basis = as_float(call.basis), coeff = as_float(call.coeff);
    const OptionalTensor bias = as_float(call.bias);
    const auto [y, z] = compute({x, basis, coeff, bias, call.form}, maps_wanted);
    const at::ScalarType dtype = call.x.scalar_type();
    return {y.to(dtype), z.defined() ? z.to(dtype) : z};
  }
  const Algorithm algorithm = choose_algorithm(at::kCPU, call.x, call.basis, call.coeff, call.form);
  if (algorithm == Algorithm::Tiles) {
    return tiles_forward(call);
  }
  if (algorithm == Algorithm::TwoConvolutions || algorithm == Algorithm::Reconstruct) {
    if (maps_wanted) {
      return two_convolutions_with_maps(call);
    }
    return {(algorithm == Algorithm::Reconstruct ? reconstructed : two_convolutions)(call), {}};
  }
  const auto fill = algorithm == Algorithm::Winograd    ? winograd_forward
                    : algorithm == Algorithm::Pointwise ? pointwise_forward
                                                        : direct_forward;
  const Outputs outputs(call);
  fill(call, outputs);
  return {outputs.y, outputs.z};
}

at::Tensor forward(const Forward& call) {
  return arranged(std::get<0>(compute(call, false)), output_format(call.x, call.basis));
}

WithMaps with_maps(const Forward& call) {
  const auto [y, z] = compute(call, true);
  const at::MemoryFormat format = output_format(call.x, call.basis);
  return {arranged(y, format), arranged(z, format)};
}

// Whether z = y - z_bias has lost digits to a bias that is larger than the maps themselves, judged by some of
// their pixels. To about these ratios the rounding of y adds no more than torch's own errors.
bool bias_cost_digits(const at::Tensor& z, const at::Tensor& z_bias) {
  constexpr int64_t images = 4, rows = 16, columns = 16;  // at most twice as many are looked at
  const double ratio = z.element_size() == 2 ? 1.5 : 8;
  if (z.numel() == 0) {
    return false;
  }
  const auto some = [](const at::Tensor& t, int64_t dim, int64_t count) {
    return t.slice(dim, 0, t.size(dim), std::max<int64_t>(1, t.size(dim) / count));
  };
  const at::Tensor bias = z_bias.to(at::kDouble);
  const at::Tensor maps = some(some(some(z, 0, images), 2, rows), 3, columns).to(at::kDouble);
  const at::Tensor squares = (maps - bias.unsqueeze(-1).unsqueeze(-1)).square().mean({0, 2, 3});
  return !(bias.square() <= ratio * ratio * squares).all().item<bool>();  // NaN: yes
}

Gradients compute(const Backward& call) {
  const Algorithm algorithm = choose_algorithm(at::kCPU, call.x, call.basis, call.coeff, call.form);
  switch (algorithm) {
    case Algorithm::Winograd:
    case Algorithm::Pointwise:
    case Algorithm::Direct:
      return laid_out(own_backward(algorithm, call), call.x, call.basis);
    case Algorithm::Tiles:
      return laid_out(tiles_backward(call), call.x, call.basis);
    case Algorithm::TwoConvolutions:
      return laid_out(backward_by_two_convolutions(call), call.x, call.basis);
    case Algorithm::Reconstruct:
      return laid_out(backward_by_reconstruction(call), call.x, call.basis);
  }
  return {};
}

Gradients backward(const Backward& call) {
  const Form& form = call.form;
  const bool maps_used =
      call.wanted[2] && choose_algorithm(at::kCPU, call.x, call.basis, call.coeff, form) != Algorithm::Reconstruct;
  const bool again = maps_used && call.z_bias.has_value() && bias_cost_digits(call.z, *call.z_bias);
  const auto maps_of = [&](const at::Tensor& x, const at::Tensor& basis) {
    if (choose_algorithm(at::kCPU, x, basis, call.coeff, form) == Algorithm::Tiles) {
      const Form maps_alone{form.stride, form.padding, form.dilation, true};
      return std::get<0>(tiles_forward({x, basis, call.coeff.narrow(0, 0, 0), std::nullopt, maps_alone}));
    }
    return at::conv2d_symint(x, basis, std::nullopt, form.stride, form.padding, form.dilation);
  };
  const OptionalTensor z_bias = again ? std::nullopt : call.z_bias;
  if (!widened(call.x, call.basis, call.coeff, form)) {
    const at::Tensor z = again ? maps_of(call.x, call.basis) : call.z;
    return compute({call.grad, call.x, call.basis, call.coeff, z, z_bias, form, call.wanted});
  }
  const at::Tensor grad = as_float(call.grad), x = as_float(call.x), basis = as_float(call.basis);
  const at::Tensor coeff = as_float(call.coeff), z = again ? maps_of(x, basis) : as_float(call.z);
  const OptionalTensor wide_bias = as_float(z_bias);
  const auto [dx, dbasis, dcoeff, dbias] = compute({grad, x, basis, coeff, z, wide_bias, form, call.wanted});
  const auto narrow = [&](const at::Tensor& t) { return t.defined() ? t.to(call.x.scalar_type()) : t; };
  return {narrow(dx), narrow(dbasis), narrow(dcoeff), narrow(dbias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CPU, m) { implement<checked<forward>, checked<with_maps>, checked<backward>>(m); }

}  // namespace growkernels::basis_conv
