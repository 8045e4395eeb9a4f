// Second and third derivatives of the activation functions, of ATen's differentiable ops.

#include "splitting/splitting.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>

#include <cmath>

namespace growkernels::splitting {
namespace {

constexpr double tanh_scale = M_2_SQRTPI * M_SQRT1_2, tanh_cubic = 0.044715;  // of GELU's tanh approximation

// 16-bit values as float32. Beyond 1000 exp(-|z|) is zero in every type, while the polynomials it is multiplied by
// may overflow; softplus has none.
at::Tensor operand(const at::Tensor& preact, const Curvature& curvature) {
  const at::Tensor z = preact.element_size() == 2 ? preact.to(at::kFloat) : preact;
  return curvature.activation == Activation::Softplus ? z : at::clamp(z, -1000, 1000);
}

at::Tensor normal_density(const at::Tensor& z) { return at::exp(-0.5 * z * z) * (M_2_SQRTPI * M_SQRT1_2 / 2); }

// gelu_tanh(z) = z (1 + t) / 2, t = tanh u: with q = 1 - t^2, f'' = q (u' + z r / 2), r = u'' - 2 t u'^2.
struct GeluTanhTerms {
  explicit GeluTanhTerms(const at::Tensor& z)
      : t(at::tanh(tanh_scale * (z + tanh_cubic * z * z * z))),
        q(1 - t * t),
        u1(tanh_scale * (1 + 3 * tanh_cubic * z * z)),
        u2(6 * tanh_scale * tanh_cubic * z),
        r(u2 - 2 * t * u1 * u1) {}
  const at::Tensor t, q, u1, u2, r;
};

}  // namespace

at::Tensor second_derivative(const at::Tensor& preact, const Curvature& curvature) {
  const at::Tensor z = operand(preact, curvature);
  switch (curvature.activation) {
    case Activation::Gelu:
      return normal_density(z) * (2 - z * z);
    case Activation::GeluTanh: {
      const GeluTanhTerms f(z);
      return f.q * (f.u1 + 0.5 * z * f.r);
    }
    case Activation::Tanh: {
      const at::Tensor t = at::tanh(z);
      return -2 * t * (1 - t * t);
    }
    case Activation::Silu: {
      const at::Tensor s = at::sigmoid(z);
      return s * (1 - s) * (2 + z * (1 - 2 * s));
    }
    case Activation::Sigmoid: {
      const at::Tensor s = at::sigmoid(z);
      return s * (1 - s) * (1 - 2 * s);
    }
    case Activation::Softplus: {
      const at::Tensor s = at::sigmoid(curvature.beta * z);
      return curvature.beta * s * (1 - s);
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor third_derivative(const at::Tensor& preact, const Curvature& curvature) {
  const at::Tensor z = operand(preact, curvature);
  switch (curvature.activation) {
    case Activation::Gelu:
      return normal_density(z) * z * (z * z - 4);
    case Activation::GeluTanh: {
      const GeluTanhTerms f(z);
      const at::Tensor r1 = 6 * tanh_scale * tanh_cubic - 2 * f.q * f.u1 * f.u1 * f.u1 - 4 * f.t * f.u1 * f.u2;
      return f.q * (f.u2 + 0.5 * f.r + 0.5 * z * r1 - 2 * f.t * f.u1 * (f.u1 + 0.5 * z * f.r));
    }
    case Activation::Tanh: {
      const at::Tensor t2 = at::tanh(z).square();
      return -2 * (1 - t2) * (1 - 3 * t2);
    }
    case Activation::Silu: {
      const at::Tensor s = at::sigmoid(z), bell = s * (1 - s), tilt = 1 - 2 * s;
      return bell * (tilt * (3 + z * tilt) - 2 * z * bell);
    }
    case Activation::Sigmoid: {
      const at::Tensor s = at::sigmoid(z), bell = s * (1 - s);
      return bell * (1 - 6 * bell);
    }
    case Activation::Softplus: {
      const at::Tensor s = at::sigmoid(curvature.beta * z);
      return curvature.beta * curvature.beta * s * (1 - s) * (1 - 2 * s);
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace growkernels::splitting
