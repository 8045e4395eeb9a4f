#pragma once
// Loading: a chunk of samples becomes the two operands of a tile product, with the layer's mask,
// activation and scale applied on the way into cache. Torch's tensors are read once and never changed.

#include "common/gemm_tile.h"
#include "virtual_grad/virtual_grad.h"

#include <ATen/CPUFunctions.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdint>

namespace growkernels::virtual_grad {

// A[i, m] = g[m, i], or 0 where masked and h[m, i] is not positive (the derivative of ReLU as torch
// takes it: 0 at 0). Depth is padded with zeros to `padded_depth`.
template <typename In, typename Operand, bool masked>
void pack_gradient(const In* g, int64_t g_stride, const In* h, int64_t h_stride, int64_t depth, int64_t padded_depth,
                   int64_t width, Operand* a) {
  constexpr int64_t block = 16;  // both sides of a block are whole cache lines of float32
  for (int64_t m = 0; m < depth; m += block) {
    const int64_t block_depth = std::min(block, depth - m);
    for (int64_t i = 0; i < width; i += block) {
      const int64_t block_width = std::min(block, width - i);
      Operand values[block][block];
      for (int64_t r = 0; r < block_depth; ++r) {
        const In* g_row = g + (m + r) * g_stride + i;
        const In* h_row = h + (m + r) * h_stride + i;
        for (int64_t q = 0; q < block_width; ++q) {
          values[r][q] = !masked || h_row[q] > In(0) ? static_cast<Operand>(g_row[q]) : Operand(0);
        }
      }
      for (int64_t q = 0; q < block_width; ++q) {
        for (int64_t r = 0; r < block_depth; ++r) {
          a[(i + q) * padded_depth + m + r] = values[r][q];
        }
      }
    }
  }
  for (int64_t m = depth; m < padded_depth; ++m) {
    for (int64_t i = 0; i < width; ++i) {
      a[i * padded_depth + m] = Operand(0);
    }
  }
}

// Rows of x, widened and scaled.
template <typename In, typename Out>
void widen(const In* x, int64_t stride, int64_t depth, int64_t width, double scale, Out* out) {
  const Out factor = static_cast<Out>(scale);
  for (int64_t m = 0; m < depth; ++m) {
    for (int64_t j = 0; j < width; ++j) {
      out[m * width + j] = factor * static_cast<Out>(x[m * stride + j]);
    }
  }
}

// In place and in ATen's own vectorised functions, called below the dispatcher: this runs on worker threads.
template <typename Acc>
void activate_in_place(Acc* x, int64_t count, Activation activation) {
  at::Tensor view = at::from_blob(x, {count}, c10::CppTypeToScalarType<Acc>::value);
  switch (activation) {
    case Activation::Tanh:
      at::cpu::tanh_out(view, view);
      break;
    case Activation::Relu:
      at::cpu::clamp_min_out(view, view, 0);
      break;
    case Activation::Gelu:
      at::cpu::gelu_out(view, view);
      break;
    case Activation::Silu:
      at::cpu::silu_out(view, view);
      break;
    case Activation::Sigmoid:
      at::cpu::sigmoid_out(view, view);
      break;
  }
}

// The layout that bfloat16 tiles want: rows in pairs, interleaved (gemm_tile.h); an odd last row gets zeros.
template <typename In>
void interleave_rows(const In* x, int64_t stride, int64_t depth, int64_t width, at::BFloat16* out) {
  for (int64_t m = 0; m < depth; m += 2) {
    const In* even = x + m * stride;
    at::BFloat16* pair = out + m * width;
    if (m + 1 < depth) {
      const In* odd = even + stride;
      for (int64_t j = 0; j < width; ++j) {
        pair[2 * j] = static_cast<at::BFloat16>(even[j]);
        pair[2 * j + 1] = static_cast<at::BFloat16>(odd[j]);
      }
    } else {
      for (int64_t j = 0; j < width; ++j) {
        pair[2 * j] = static_cast<at::BFloat16>(even[j]);
        pair[2 * j + 1] = at::BFloat16(0);
      }
    }
  }
}

}  // namespace growkernels::virtual_grad
