#include "common/activation_torch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tanh.h>

#include <cmath>
#include <string>

namespace growkernels {
namespace {

// An activation's value and first derivative, second and third derivative: whatever an op needs.

struct Tanh {
  static at::Tensor value(const at::Tensor& z) { return at::tanh(z); }
  static at::Tensor first(const at::Tensor& z) {
    const at::Tensor t = at::tanh(z);
    return 1 - t * t;
  }
  static at::Tensor second(const at::Tensor& z, double) {
    const at::Tensor t = at::tanh(z);
    return -2 * t * (1 - t * t);
  }
  static at::Tensor third(const at::Tensor& z, double) {
    const at::Tensor t2 = at::tanh(z).square();
    return -2 * (1 - t2) * (1 - 3 * t2);
  }
};

struct Relu {
  static at::Tensor value(const at::Tensor& z) { return at::relu(z); }
  // As torch takes it: 0 where z <= 0, else 1, also for NaN.
  static at::Tensor first(const at::Tensor& z) { return (~(z <= 0)).to(z.scalar_type()); }
};

struct Gelu {
  static at::Tensor density(const at::Tensor& z) { return at::exp(-0.5 * z * z) * (M_2_SQRTPI * M_SQRT1_2 / 2); }
  static at::Tensor value(const at::Tensor& z) { return at::gelu(z); }
  static at::Tensor first(const at::Tensor& z) { return 0.5 * (1 + at::erf(z * M_SQRT1_2)) + z * density(z); }
  static at::Tensor second(const at::Tensor& z, double) { return density(z) * (2 - z * z); }
  static at::Tensor third(const at::Tensor& z, double) { return density(z) * z * (z * z - 4); }
};

// z (1 + t) / 2, t = tanh u: with q = 1 - t^2, f'' = q (u' + z r / 2), r = u'' - 2 t u'^2.
struct GeluTanh {
  static constexpr double scale = M_2_SQRTPI * M_SQRT1_2, cubic = 0.044715;

  struct Terms {
    explicit Terms(const at::Tensor& z)
        : t(at::tanh(scale * (z + cubic * z * z * z))),
          q(1 - t * t),
          u1(scale * (1 + 3 * cubic * z * z)),
          u2(6 * scale * cubic * z),
          r(u2 - 2 * t * u1 * u1) {}
    const at::Tensor t, q, u1, u2, r;
  };

  static at::Tensor second(const at::Tensor& z, double) {
    const Terms f(z);
    return f.q * (f.u1 + 0.5 * z * f.r);
  }
  static at::Tensor third(const at::Tensor& z, double) {
    const Terms f(z);
    const at::Tensor r1 = 6 * scale * cubic - 2 * f.q * f.u1 * f.u1 * f.u1 - 4 * f.t * f.u1 * f.u2;
    return f.q * (f.u2 + 0.5 * f.r + 0.5 * z * r1 - 2 * f.t * f.u1 * (f.u1 + 0.5 * z * f.r));
  }
};

struct Silu {
  static at::Tensor value(const at::Tensor& z) { return at::silu(z); }
  static at::Tensor first(const at::Tensor& z) {
    const at::Tensor s = at::sigmoid(z);
    return s * (1 + z * (1 - s));
  }
  static at::Tensor second(const at::Tensor& z, double) {
    const at::Tensor s = at::sigmoid(z);
    return s * (1 - s) * (2 + z * (1 - 2 * s));
  }
  static at::Tensor third(const at::Tensor& z, double) {
    const at::Tensor s = at::sigmoid(z), bell = s * (1 - s), tilt = 1 - 2 * s;
    return bell * (tilt * (3 + z * tilt) - 2 * z * bell);
  }
};

struct Sigmoid {
  static at::Tensor value(const at::Tensor& z) { return at::sigmoid(z); }
  static at::Tensor first(const at::Tensor& z) {
    const at::Tensor s = at::sigmoid(z);
    return s * (1 - s);
  }
  static at::Tensor second(const at::Tensor& z, double) {
    const at::Tensor s = at::sigmoid(z);
    return s * (1 - s) * (1 - 2 * s);
  }
  static at::Tensor third(const at::Tensor& z, double) {
    const at::Tensor s = at::sigmoid(z), bell = s * (1 - s);
    return bell * (1 - 6 * bell);
  }
};

struct Softplus {
  static at::Tensor second(const at::Tensor& z, double beta) {
    const at::Tensor s = at::sigmoid(beta * z);
    return beta * s * (1 - s);
  }
  static at::Tensor third(const at::Tensor& z, double beta) {
    const at::Tensor s = at::sigmoid(beta * z);
    return beta * beta * s * (1 - s) * (1 - 2 * s);
  }
};

struct Functions {
  at::Tensor (*value)(const at::Tensor&) = nullptr;
  at::Tensor (*first)(const at::Tensor&) = nullptr;
  at::Tensor (*second)(const at::Tensor&, double beta) = nullptr;
  at::Tensor (*third)(const at::Tensor&, double beta) = nullptr;
};

template <typename A>
constexpr Functions functions_of() {
  Functions functions;
  if constexpr (requires { A::value; }) {
    functions.value = A::value;
    functions.first = A::first;
  }
  if constexpr (requires { A::second; }) {
    functions.second = A::second;
    functions.third = A::third;
  }
  return functions;
}

const Functions& functions_of(Activation activation) {
  // In the order of the enumeration.
  static constexpr Functions all[] = {functions_of<Tanh>(),    functions_of<Relu>(),    functions_of<Gelu>(),
                                      functions_of<Silu>(),    functions_of<Sigmoid>(), functions_of<GeluTanh>(),
                                      functions_of<Softplus>()};
  return all[static_cast<size_t>(activation)];
}

// 16-bit values as float32. Beyond 1000 exp(-|z|) is zero in every type, while the polynomials it is multiplied by
// may overflow; softplus has none.
at::Tensor bounded(const at::Tensor& values, Activation activation) {
  const at::Tensor z = values.element_size() == 2 ? values.to(at::kFloat) : values;
  return activation == Activation::Softplus ? z : at::clamp(z, -1000, 1000);
}

}  // namespace

Activation parse_activation(const char* op, std::string_view name, std::initializer_list<Activation> known) {
  std::string names;
  for (const Activation& activation : known) {
    const char* const its = activation_names[static_cast<size_t>(activation)];
    if (name == its) {
      return activation;
    }
    names += &activation == known.begin() ? "'" : &activation == known.end() - 1 ? " or '" : ", '";
    names.append(its).append("'");
  }
  TORCH_CHECK_VALUE(false, op, ": unknown activation '", name, "'; use ", names);
}

at::Tensor activate(const at::Tensor& z, Activation activation) { return functions_of(activation).value(z); }

at::Tensor first_derivative(const at::Tensor& z, Activation activation) { return functions_of(activation).first(z); }

at::Tensor second_derivative(const at::Tensor& z, Activation activation, double beta) {
  return functions_of(activation).second(bounded(z, activation), beta);
}

at::Tensor third_derivative(const at::Tensor& z, Activation activation, double beta) {
  return functions_of(activation).third(bounded(z, activation), beta);
}

}  // namespace growkernels
