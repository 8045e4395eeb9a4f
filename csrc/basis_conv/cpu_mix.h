#pragma once
// The linear combinations of the maps, pixel by pixel, float32, on the CPU: M maps become Q mixed channels.

#include <cstdint>

namespace growkernels::basis_conv {

// mixed = z coeff^T for `pixels` pixels, single-threaded. coeff_transposed is [M, Q].
void mix_pixels(int64_t pixels, const float* z, int64_t z_stride, int64_t maps, const float* coeff_transposed,
                int64_t mixed_channels, float* mixed, int64_t mixed_stride);

// The way back, in one pass over the gradient of y. coeff and dcoeff are [Q, M].
struct MixBackward {
  int64_t pixels, maps, mixed_channels;
  const float* top;    // gradient of the maps' own channels in y, or null where y has none
  const float* mixed;  // gradient of the mixed channels
  int64_t grad_stride;
  const float* z;
  int64_t z_stride;
  const float* z_bias;  // [M] that z contains and the maps do not, or null
  const float* coeff;
  float* dz;      // [pixels, M] = top + mixed coeff, or null
  float* dcoeff;  // = mixed^T (z - z_bias), or null
};
void mix_backward(const MixBackward& call);

}  // namespace growkernels::basis_conv
