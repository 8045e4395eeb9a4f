#include "splitting/splitting.h"

#include "common/activation_torch.h"

#include <c10/util/irange.h>

#include <cmath>

namespace growkernels::splitting {
namespace {

void check_float(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()) && tensor.element_size() >= 2, op, ": ", name,
                   " has dtype ", tensor.scalar_type(), "; pass float16, bfloat16, float32 or float64");
}

// `tensor` must go with `first`: one dtype, one device.
void check_like(const char* op, const char* first_name, const at::Tensor& first, const char* name,
                const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == first.scalar_type(), op, ": ", name, " has dtype ", tensor.scalar_type(),
                   " but ", first_name, " has ", first.scalar_type(), "; cast them to one dtype");
  TORCH_CHECK_VALUE(tensor.device() == first.device(), op, ": ", name, " is on ", tensor.device(), " but ", first_name,
                    " is on ", first.device(), "; move them to one device");
}

// Of an image, a filter and their distances, so that no sum of products of two overflows.
constexpr int64_t largest_size = (int64_t{1} << 31) - 1;

// Sizes that are traced stay as they are: a limit would become a guard.
bool at_most_largest(const c10::SymInt& size) { return size.maybe_as_int().value_or(0) <= largest_size; }

std::array<int64_t, 2> pair_of(const char* name, at::IntArrayRef values, int64_t smallest) {
  TORCH_CHECK_VALUE(values.size() == 2, "splitting_hvp_conv2d: ", name, " has ", values.size(),
                    " numbers; pass one, or (vertical, horizontal)");
  for (const int64_t value : values) {
    TORCH_CHECK_VALUE(value >= smallest && value <= largest_size, "splitting_hvp_conv2d: ", name, " must be from ",
                      smallest, " to ", largest_size, ", got ", value);
  }
  return {values[0], values[1]};
}

}  // namespace

Curvature parse_curvature(std::string_view activation, std::optional<double> beta) {
  constexpr const char* op = "splitting_weight";
  if (beta.has_value()) {
    TORCH_CHECK_VALUE(activation == "softplus" || activation == "relu", op,
                      ": beta belongs to 'softplus' and 'relu'; '", activation, "' takes none");
    TORCH_CHECK_VALUE(std::isfinite(*beta) && *beta > 0, op, ": beta must be positive and finite, got ", *beta);
  }
  using enum Activation;
  const Activation parsed = parse_activation(op, activation, {Gelu, GeluTanh, Silu, Tanh, Sigmoid, Softplus, Relu});
  if (parsed != Relu) {
    return {parsed, beta.value_or(1.0)};
  }
  TORCH_CHECK_VALUE(beta.has_value(), op,
                    ": ReLU's second derivative is zero wherever it exists, so its splitting matrices vanish; pass "
                    "beta (say 3) to have softplus with that beta stand in for it");
  return {Softplus, *beta};
}

Sliding parse_sliding(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  return {pair_of("stride", stride, 1), pair_of("padding", padding, 0), pair_of("dilation", dilation, 1)};
}

void check_weight(const Weight& call) {
  constexpr const char* op = "splitting_weight";
  const at::Tensor &grad = call.grad, &preact = call.preact;
  check_float(op, "preact", preact);
  check_like(op, "preact", preact, "grad", grad);
  TORCH_CHECK_VALUE(grad.sym_sizes() == preact.sym_sizes(), op, ": grad has shape ", grad.sym_sizes(),
                    " but preact has shape ", preact.sym_sizes(), "; they must be equal");
}

void check_hvp(const Hvp& call) {
  constexpr const char* op = "splitting_hvp";
  const at::Tensor &x = call.x, &w = call.w, &v = call.v;
  check_float(op, "x", x);
  check_like(op, "x", x, "w", w);
  check_like(op, "x", x, "v", v);
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x has shape ", x.sym_sizes(), "; it needs [M, d]: flatten leading dimensions");
  TORCH_CHECK_VALUE(w.dim() == 2, op, ": w has shape ", w.sym_sizes(), "; it needs [M, n]: flatten leading dimensions");
  TORCH_CHECK_VALUE(v.dim() == 2 || v.dim() == 3, op, ": v has shape ", v.sym_sizes(),
                    "; it needs [n, d], or [n, k, d] for k vectors for each neuron");
  TORCH_CHECK_VALUE(w.sym_size(0) == x.sym_size(0), op, ": w has ", w.sym_size(0), " rows but x has ", x.sym_size(0),
                    "; both need one for every sample");
  TORCH_CHECK_VALUE(v.sym_size(0) == w.sym_size(1), op, ": v holds vectors for ", v.sym_size(0), " neurons but w has ",
                    w.sym_size(1), " columns; both need one for every neuron");
  TORCH_CHECK_VALUE(v.sym_size(-1) == x.sym_size(1), op, ": v holds vectors of length ", v.sym_size(-1),
                    " but x has rows of length ", x.sym_size(1), "; they must be equal");
}

void check_hvp_conv2d(const HvpConv2d& call, const Sliding& sliding) {
  constexpr const char* op = "splitting_hvp_conv2d";
  const at::Tensor &x = call.x, &w = call.w, &v = call.v;
  check_float(op, "x", x);
  check_like(op, "x", x, "w", w);
  check_like(op, "x", x, "v", v);
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x has shape ", x.sym_sizes(), "; it needs [N, C, H, W]");
  TORCH_CHECK_VALUE(w.dim() == 4, op, ": w has shape ", w.sym_sizes(), "; it needs [N, n, Ho, Wo]");
  TORCH_CHECK_VALUE(v.dim() == 4 || v.dim() == 5, op, ": v has shape ", v.sym_sizes(),
                    "; it needs [n, C, kh, kw], or [n, k, C, kh, kw] for k filters for each neuron");
  TORCH_CHECK_VALUE(w.sym_size(0) == x.sym_size(0), op, ": w has ", w.sym_size(0), " images but x has ", x.sym_size(0),
                    "; they must be equal");
  TORCH_CHECK_VALUE(v.sym_size(0) == w.sym_size(1), op, ": v holds filters for ", v.sym_size(0), " neurons but w has ",
                    w.sym_size(1), " channels; both need one for every neuron");
  TORCH_CHECK_VALUE(v.sym_size(-3) == x.sym_size(1), op, ": v holds filters of ", v.sym_size(-3),
                    " channels but x has ", x.sym_size(1), "; they must be equal");
  for (const auto axis : c10::irange(2)) {
    const c10::SymInt taps = v.sym_size(axis - 2), size = x.sym_size(axis + 2);
    TORCH_CHECK_VALUE(taps >= 1, op, ": v has shape ", v.sym_sizes(), "; a filter needs at least one tap each way");
    TORCH_CHECK_VALUE(at_most_largest(taps) && at_most_largest(size), op, ": images of ", size, " and filters of ",
                      taps, " pixels a side; both may have at most ", largest_size);
    const c10::SymInt room = size + 2 * sliding.padding[axis] - sliding.dilation[axis] * (taps - 1);
    TORCH_CHECK_VALUE(room >= 1, op, ": a filter of ", taps, " taps, dilation ", sliding.dilation[axis],
                      ", does not fit into a padded image of size ", size + 2 * sliding.padding[axis]);
    const c10::SymInt positions = (room - 1) / sliding.stride[axis] + 1;
    TORCH_CHECK_VALUE(w.sym_size(axis + 2) == positions, op, ": w has shape ", w.sym_sizes(),
                      "; the convolution's output has size ", positions, " along dimension ", axis + 2);
  }
}

}  // namespace growkernels::splitting
