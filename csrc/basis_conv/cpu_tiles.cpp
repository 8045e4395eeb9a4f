#include "basis_conv/cpu_tiles.h"

#include "common/huge_pages.h"
#include "common/kernels_ran.h"
#include "common/scratch.h"
#include "common/vector_width.h"
#include "common/workspace.h"
#include "convolution/direct_tiles.h"
#include "convolution/layout.h"
#include "convolution/tile_packing.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

namespace growkernels::basis_conv {

using namespace convolution;
using c10::BFloat16;

namespace {

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;

Sliding sliding(const at::Tensor& basis, const Form& form, int64_t axis) {
  return {basis.size(axis + 2), form.stride[axis].expect_int(), form.padding[axis].expect_int(),
          form.dilation[axis].expect_int()};
}

at::Tensor fresh(const at::Tensor& like, at::IntArrayRef shape) {
  const at::Tensor tensor = at::empty(shape, like.options().memory_format(channels_last));
  advise_huge_pages(tensor);
  return tensor;
}

// A kernel whose taps' rows of channels are adjacent, as pack_matrix wants them.
at::Tensor with_adjacent_inputs(const at::Tensor& basis) {
  return basis.stride(1) == 1 || basis.stride(0) == 1 ? basis : basis.contiguous(channels_last);
}

at::Tensor packed(const BFloat16* data, int64_t depth, int64_t depth_stride, int64_t columns, int64_t column_stride) {
  const at::Tensor result = at::empty({packed_matrix_size(depth, columns)}, at::kBFloat16);
  pack_matrix(data, depth, depth_stride, columns, column_stride, packed_matrix_size(depth, 1),
              result.mutable_data_ptr<BFloat16>());
  return result;
}

std::vector<float> widened(const OptionalTensor& values) {
  std::vector<float> result;
  if (values.has_value()) {
    const at::Tensor dense = values->contiguous();
    const BFloat16* const data = dense.const_data_ptr<BFloat16>();
    result.assign(data, data + dense.numel());
  }
  return result;
}

const float* at_or_null(const std::vector<float>& values, int64_t first) {
  return values.empty() ? nullptr : values.data() + first;
}

// Where pixels of y, of z or of a gradient lie.
struct Pixels {
  BFloat16* data;
  int64_t stride;
};

// Some channels of 32 pixels into their places.
template <typename In>
void store(const In* rows, const float* bias, int64_t count, const Pixels& to, int64_t channel, const int64_t* pixels) {
  widest<StoreRows<In>>(rows, bias, count, pixels, to.data + channel, to.stride);
}

struct ForwardCall {
  Pixels y, z;  // z where it is not a part of y
  bool include_basis;
  int64_t maps, mixed;
  const BFloat16* coeff;    // packed
  std::vector<float> bias;  // of y, or empty
  int64_t map_blocks() const { return at::divup(maps, block_columns); }
};

// The maps are rounded once, and are mixed as they are: 32 pixels' are tiles of A in a row.
class MixingSink final : public Sink {
 public:
  explicit MixingSink(const ForwardCall& call) : call_(call) {}

  void begin(int64_t slots) override { maps_ = memory_.at_least(slots * call_.map_blocks() * 2 * packed_tile); }

  void take(int64_t slot, int64_t column, const float* sums, const int64_t* pixels) override {
    BFloat16* const maps = of(slot) + column * 2 * packed_tile;
    widest<RoundSums>(sums, block_pixels * block_columns, maps);
    const int64_t channel = column * block_columns, count = std::min(block_columns, call_.maps - channel);
    const float* const bias = call_.include_basis ? at_or_null(call_.bias, channel) : nullptr;
    for (int64_t p = 0; count < block_columns && p < block_pixels; ++p) {  // no zero would make a NaN vanish
      std::fill_n(maps + p * packed_depth + count, packed_depth - count, BFloat16(0));
    }
    // torch adds the bias to maps that are rounded already.
    store(static_cast<const BFloat16*>(maps), bias, count, call_.include_basis ? call_.y : call_.z, channel, pixels);
  }

  void finish(const TileSums& tiles, int64_t slot, const int64_t* pixels) override {
    const int64_t zero = 0, depth = call_.map_blocks(), first = call_.include_basis ? call_.maps : 0;
    for (int64_t channel = 0; channel < call_.mixed; channel += block_columns) {
      const int64_t count = std::min(block_columns, call_.mixed - channel);
      tiles.add(2, count > packed_columns ? 2 : 1,
                {1, depth, of(slot), &zero, 2 * packed_tile, packed_tile,
                 call_.coeff + channel / block_columns * depth * 2 * packed_tile, &zero, 2 * packed_tile, packed_tile,
                 sums_, block_columns, false});
      store(sums_, at_or_null(call_.bias, first + channel), count, call_.y, first + channel, pixels);
    }
  }

 private:
  BFloat16* of(int64_t slot) const { return maps_ + slot * call_.map_blocks() * 2 * packed_tile; }

  const ForwardCall& call_;
  Scratch<BFloat16> memory_;
  BFloat16* maps_ = nullptr;
  alignas(64) float sums_[block_pixels * block_columns] = {};
};

// Stores the sums, rounded.
class StoringSink final : public Sink {
 public:
  StoringSink(const Pixels& to, int64_t channels) : to_(to), channels_(channels) {}

  void take(int64_t, int64_t column, const float* sums, const int64_t* pixels) override {
    const int64_t channel = column * block_columns;
    store(sums, nullptr, std::min(block_columns, channels_ - channel), to_, channel, pixels);
  }

 private:
  const Pixels to_;
  const int64_t channels_;
};

// --- The way back through the mix, 256 pixels at a time, in one pass over the gradient of y.

constexpr int64_t pass_pixels = 256, pass_depth = pass_pixels / packed_depth;

struct MixBackwardCall {
  int64_t pixels, maps, mixed;
  const BFloat16* top;   // gradient of the maps' own channels in y, or null
  const BFloat16* grad;  // of the mixed channels
  int64_t grad_stride;
  const BFloat16* z;
  int64_t z_stride;
  const float* z_bias;    // or null
  const BFloat16* coeff;  // packed: from the mixed channels to the maps
  BFloat16* dz;           // [pixels, maps], or null
  bool dcoeff;

  int64_t mixed_tiles() const { return at::divup(mixed, packed_rows); }
  int64_t map_tiles() const { return at::divup(maps, packed_columns); }
  int64_t mixed_blocks() const { return at::divup(mixed, block_columns); }
  int64_t map_blocks() const { return at::divup(maps, block_columns); }
  // Sums of one worker for dcoeff: [block of mixed channels][block of maps][32][32].
  int64_t sums() const { return dcoeff ? mixed_blocks() * map_blocks() * block_pixels * block_columns : 0; }
};

class MixBackwardWorker {
 public:
  MixBackwardWorker(const MixBackwardCall& call, float* sums)
      : call_(call), dcoeff_(sums), zeros_(std::max(call.maps, call.mixed)) {
    std::fill_n(sums, call.sums(), 0.f);
  }

  void run(int64_t first) {
    const int64_t count = std::min(pass_pixels, call_.pixels - first);
    if (call_.dz != nullptr) {
      maps_gradient(first, count);
    }
    if (call_.dcoeff) {
      coefficients_gradient(first, count);
    }
  }

 private:
  void maps_gradient(int64_t first, int64_t count) {
    const int64_t plane = pass_pixels * packed_depth, zero = 0;
    BFloat16* const rows = rows_.at_least(plane * call_.mixed_blocks());
    PackedAxis axis;
    axis.pitch = axis.count = count;
    widest<PackPixels>(call_.grad + first * call_.grad_stride, call_.grad_stride, count, call_.mixed, axis, int64_t{1},
                       plane, rows);
    for (int64_t pixel = 0; pixel < count; pixel += block_pixels) {
      const int64_t here = std::min(block_pixels, count - pixel);
      for (int64_t channel = 0; channel < call_.maps; channel += block_columns) {
        const int64_t width = std::min(block_columns, call_.maps - channel);
        tiles_.add(here > packed_rows ? 2 : 1, width > packed_columns ? 2 : 1,
                   {1, call_.mixed_blocks(), rows + pixel * packed_depth, &zero, plane, packed_tile,
                    call_.coeff + channel / block_columns * call_.mixed_blocks() * 2 * packed_tile, &zero,
                    2 * packed_tile, packed_tile, sums_, block_columns, false});
        const int64_t at = first + pixel;
        widest<AddTop>(static_cast<const float*>(sums_), here,
                       call_.top == nullptr ? nullptr : call_.top + at * call_.grad_stride + channel, call_.grad_stride,
                       width, call_.dz + at * call_.maps + channel, call_.maps);
      }
    }
  }

  void coefficients_gradient(int64_t first, int64_t count) {
    const int64_t plane = pass_depth * packed_tile, zero = 0;
    BFloat16* const grads = grads_.at_least(plane * call_.mixed_tiles());
    BFloat16* const maps = maps_.at_least(plane * call_.map_tiles());
    const int64_t depth = at::divup(count, packed_depth);
    BFloat16* const unbiased = unbiased_.at_least(call_.z_bias != nullptr ? packed_depth * call_.maps : 0);
    for (int64_t block = 0; block < depth; ++block) {
      const BFloat16* grad_rows[packed_depth];
      const BFloat16* map_rows[packed_depth];
      for (int64_t p = 0; p < packed_depth; ++p) {
        const int64_t pixel = block * packed_depth + p;
        const bool inside = pixel < count;
        grad_rows[p] = inside ? call_.grad + (first + pixel) * call_.grad_stride : zeros_.data();
        map_rows[p] = inside ? call_.z + (first + pixel) * call_.z_stride : zeros_.data();
        if (inside && call_.z_bias != nullptr) {
          widest<Subtract>(map_rows[p], call_.z_bias, call_.maps, unbiased + p * call_.maps);
          map_rows[p] = unbiased + p * call_.maps;
        }
      }
      widest<PackTransposed>(static_cast<const BFloat16* const*>(grad_rows), call_.mixed, plane,
                             grads + block * packed_tile);
      widest<PackPairs>(static_cast<const BFloat16* const*>(map_rows), packed_depth, call_.maps, plane,
                        maps + block * packed_tile);
    }
    for (int64_t q = 0; q < call_.mixed_blocks(); ++q) {
      for (int64_t r = 0; r < call_.map_blocks(); ++r) {
        tiles_.add(
            std::min<int64_t>(2, call_.mixed_tiles() - 2 * q), std::min<int64_t>(2, call_.map_tiles() - 2 * r),
            {1, depth, grads + 2 * q * plane, &zero, packed_tile, plane, maps + 2 * r * plane, &zero, packed_tile,
             plane, dcoeff_ + (q * call_.map_blocks() + r) * block_pixels * block_columns, block_columns, true});
      }
    }
  }

  struct AddTop {
    template <int bytes>
    [[gnu::always_inline]] static inline void run(const float* sums, int64_t pixels, const BFloat16* top,
                                                  int64_t top_stride, int64_t count, BFloat16* out,
                                                  int64_t out_stride) {
      const auto add = [&](int64_t width) __attribute__((always_inline)) {
        for (int64_t p = 0; p < pixels; ++p, sums += block_columns, out += out_stride) {
          for (int64_t j = 0; j < width; ++j) {
            out[j] = rounded(top == nullptr ? sums[j] : sums[j] + cast<float>(top[j]));
          }
          top += top == nullptr ? 0 : top_stride;
        }
      };
      count == block_columns ? add(block_columns) : add(count);
    }
  };

  struct Subtract {
    template <int bytes>
    [[gnu::always_inline]] static inline void run(const BFloat16* x, const float* y, int64_t count, BFloat16* out) {
      for (int64_t j = 0; j < count; ++j) {
        out[j] = rounded(cast<float>(x[j]) - y[j]);
      }
    }
  };

  const MixBackwardCall& call_;
  float* const dcoeff_;
  const std::vector<BFloat16> zeros_;
  const TileSums tiles_;
  Scratch<BFloat16> rows_, grads_, maps_, unbiased_;
  alignas(64) float sums_[block_pixels * block_columns] = {};
};

// dcoeff is [mixed, maps], contiguous, if it is wanted.
void mix_backward(const MixBackwardCall& call, BFloat16* dcoeff) {
  const int64_t passes = at::divup(call.pixels, pass_pixels), size = call.sums();
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(passes, at::get_num_threads()));
  const int64_t share = at::divup(passes, workers);
  std::vector<float> sums(workers * size);
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      MixBackwardWorker worker(call, sums.data() + index * size);
      for (int64_t pass = index * share; pass < std::min((index + 1) * share, passes); ++pass) {
        worker.run(pass * pass_pixels);
      }
    }
  });
  for (int64_t q = 0; dcoeff != nullptr && q < call.mixed; ++q) {
    for (int64_t r = 0; r < call.maps; ++r) {
      const int64_t block = q / block_pixels * call.map_blocks() + r / block_columns;
      const int64_t element = (block * block_pixels + q % block_pixels) * block_columns + r % block_columns;
      float total = 0;
      for (int64_t worker = 0; worker < workers; ++worker) {
        total += sums[worker * size + element];
      }
      dcoeff[q * call.maps + r] = BFloat16(total);
    }
  }
}

struct MapsGradient;  // owner of a workspace

}  // namespace

WithMaps tiles_forward(const Forward& call) {
  note(Ran::Tiles);
  const auto& [x, basis_in, coeff_in, bias, form] = call;
  const at::Tensor input = with_adjacent_channels(x), basis = with_adjacent_inputs(basis_in);
  const at::Tensor coeff = coeff_in.contiguous();
  const auto concrete = [](const c10::SymDimVector& shape) { return C10_AS_INTARRAYREF_SLOW(shape); };
  const int64_t maps = basis.size(0), mixed = coeff.size(0);
  const at::Tensor y = fresh(x, concrete(output_shape(x, basis, coeff_in, form)));
  const at::Tensor z = form.include_basis ? y.narrow(1, 0, maps) : fresh(x, concrete(maps_shape(x, basis, form)));
  const at::Tensor mixing = packed(coeff.const_data_ptr<BFloat16>(), maps, 1, mixed, maps);
  const ForwardCall work{{y.mutable_data_ptr<BFloat16>(), y.size(1)},
                         {z.mutable_data_ptr<BFloat16>(), form.include_basis ? y.size(1) : maps},
                         form.include_basis,
                         maps,
                         mixed,
                         mixing.const_data_ptr<BFloat16>(),
                         widened(bias)};
  direct_tiles_convolution(images_of<BFloat16>(input), kernels_like(basis, basis.const_data_ptr<BFloat16>()),
                           sliding(basis, form, 0), sliding(basis, form, 1), y.size(2), y.size(3),
                           [&] { return std::make_unique<MixingSink>(work); });
  return {y, z};
}

Gradients tiles_backward(const Backward& arguments) {
  note(Ran::Tiles);
  const auto& [grad_in, x, basis_in, coeff_in, z_in, z_bias, form, wanted] = arguments;
  at::Tensor grad = to_channels_last(grad_in);
  const at::Tensor basis = with_adjacent_inputs(basis_in), coeff = coeff_in.contiguous();
  const int64_t maps = basis.size(0), mixed = coeff.size(0), channels = grad.size(1);
  const int64_t pixels = grad.size(0) * grad.size(2) * grad.size(3);
  at::Tensor dx, dbasis, dcoeff, dbias, dz_memory, z;

  const BFloat16* const gradient = grad.const_data_ptr<BFloat16>();
  const at::Tensor mixing = packed(coeff.const_data_ptr<BFloat16>(), mixed, maps, maps, 1);
  const std::vector<float> offset = widened(z_bias);
  MixBackwardCall call{};
  call.pixels = pixels;
  call.maps = maps;
  call.mixed = mixed;
  call.top = form.include_basis ? gradient : nullptr;
  call.grad = gradient + channels - mixed;
  call.grad_stride = channels;
  call.coeff = mixing.const_data_ptr<BFloat16>();
  call.z_bias = at_or_null(offset, 0);
  if (wanted[0] || wanted[1]) {
    dz_memory = workspace<MapsGradient>(at::divup(pixels * maps, 2));
    call.dz = static_cast<BFloat16*>(dz_memory.mutable_data_ptr());
  }
  if (wanted[2]) {
    z = with_adjacent_channels(z_in);
    const Images<const BFloat16> maps_images = images_of<BFloat16>(z);
    call.z = maps_images.data;
    call.z_stride = maps_images.pixel_stride;
    call.dcoeff = true;
    dcoeff = at::empty(coeff.sizes(), coeff.options());
  }
  mix_backward(call, wanted[2] ? dcoeff.mutable_data_ptr<BFloat16>() : nullptr);
  if (wanted[3]) {
    dbias = grad.sum({0, 2, 3});
  }
  const Images<const BFloat16> dz{call.dz, grad.size(0), grad.size(2), grad.size(3), maps, maps};
  grad.reset();  // where it is a copy, its memory is free for the gradient of x
  const Sliding vertical = sliding(basis, form, 0), horizontal = sliding(basis, form, 1);
  if (wanted[0]) {
    dx = fresh(x, x.sizes());
    const Pixels to{dx.mutable_data_ptr<BFloat16>(), x.size(1)};
    direct_tiles_input_gradient(dz, kernels_like(basis, basis.const_data_ptr<BFloat16>()), vertical, horizontal,
                                x.size(2), x.size(3), [&] { return std::make_unique<StoringSink>(to, x.size(1)); });
    dx = laid_out(x.suggest_memory_format() == channels_last ? dx : to_contiguous(dx), x.suggest_memory_format());
  }
  if (wanted[1]) {
    const at::Tensor input = with_adjacent_channels(x);
    dbasis = at::empty(basis.sizes(), basis.options().memory_format(basis_in.suggest_memory_format()));
    direct_tiles_kernel_gradient(images_of<BFloat16>(input), dz, vertical, horizontal,
                                 kernels_like(dbasis, dbasis.mutable_data_ptr<BFloat16>()));
  }
  return {dx, dbasis, dcoeff, dbias};
}

}  // namespace growkernels::basis_conv
