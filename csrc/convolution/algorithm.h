#pragma once
// Which algorithm computes convolutions on the CPU: what the user asks for, and where Winograd's pays.

#include <c10/core/SymInt.h>

namespace growkernels::convolution {

// What `set_conv_algorithm` or, before it was called, GROWKERNELS_CONV_ALGORITHM asks for.
enum class ConvAlgorithm { Auto, Direct, Winograd };
ConvAlgorithm conv_algorithm();

// The output of a convolution, and the channels of its input.
struct OutputSize {
  c10::SymInt inputs, outputs, batch, height, width;
};

// Why Winograd's algorithm does not compute a convolution by 3 x 3 kernels with stride and dilation 1, float32; null
// where it does.
const char* winograd_obstacle(const OutputSize& size);

}  // namespace growkernels::convolution
