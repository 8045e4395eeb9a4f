// Every op's schema in one place. Implementations register themselves beside their kernels.

#include <torch/library.h>

#include <string>

TORCH_LIBRARY(growkernels, m) {
  m.set_python_module("growkernels.ops");

  // virtual_grad: gradients of layers that do not exist yet (SensLI). `layer` is one of "linear_relu",
  // "residual", "conv2d_relu", "linear"; `activation` and `scale` belong to "residual".
  m.def("virtual_grads(Tensor[] inputs, Tensor[] grads, str layer, str activation, float scale) -> Tensor[]");
  m.def("virtual_grad_norms(Tensor[] inputs, Tensor[] grads, str layer, str activation, float scale) -> Tensor");
  m.def(
      "accumulate_virtual_grads(Tensor[] inputs, Tensor[] grads, str layer, str activation, float scale, "
      "Tensor(a!)[] sums, Tensor(b!)? second_moments) -> Tensor");
  // What would compute the gradient at one position on a device, and why not the backends preferred before it: so do
  // all ops of such a name. The tensors may be elsewhere, and without data.
  m.def("virtual_grad_plan(Tensor input, str layer, Device device, int? outputs=None) -> (str, Dict(str, str))");

  // eigen: all eigenpairs of small symmetric matrices [n, m, m], of which the lower triangles are read: values
  // [n, m] ascending, vectors [n, m, m] with eigenvector i in row i. Not differentiable.
  m.def("symmetric_eigs(Tensor a, int? k=None) -> (Tensor values, Tensor vectors)");
  m.def("symmetric_eigs_plan(Tensor a, Device device) -> (str, Dict(str, str))");
  // So many blocks of directions fill a basis of growkernels/solvers/search_space.py.
  m.def("search_space_blocks() -> int");
  // On CUDA alone: a step of growkernels/solvers/search_space.py, extend and add, for k of 1 or 2. `product`,
  // [n, k, d], is S applied to columns count to count + k of the bases. The rest is the solver's state.
  m.def(
      "search_space_step_(Tensor(a!) basis, Tensor(b!) images, Tensor(c!) projected, Tensor(d!) previous, "
      "Tensor(e!) dead, Tensor(f!) norms, Tensor(g!) units, Tensor product, int count) -> ()");

  // For kernels that are launched from Python, NAME_outputs checks the arguments of NAME and returns memory for its
  // results, and NAME_composed computes them by ATen's ops on every device.
  const auto def_launched = [&m](const std::string& name, const std::string& signature) {
    for (const char* form : {"", "_outputs", "_composed"}) {
      m.def((name + form + signature).c_str());
    }
  };

  // basis_conv: convolutions whose filters are few trained ones and linear combinations of them.
  def_launched("basis_conv2d",
               "(Tensor x, Tensor basis, Tensor coeff, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
               "SymInt[2] dilation, bool include_basis) -> Tensor");
  // For training without include_basis: also returns z = conv2d(x, basis), which the backward pass needs.
  def_launched("basis_conv2d_with_maps",
               "(Tensor x, Tensor basis, Tensor coeff, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
               "SymInt[2] dilation, bool include_basis) -> (Tensor, Tensor)");
  // z may contain z_bias. Gradients (of x, basis, coeff, bias) that the mask leaves out are undefined tensors.
  def_launched("basis_conv2d_backward",
               "(Tensor grad, Tensor x, Tensor basis, Tensor coeff, Tensor z, Tensor? z_bias, SymInt[2] stride, "
               "SymInt[2] padding, SymInt[2] dilation, bool include_basis, bool[4] output_mask) -> "
               "(Tensor, Tensor, Tensor, Tensor)");
  // How basis_conv2d would compute this call.
  m.def(
      "basis_conv2d_algorithm(Tensor x, Tensor basis, Tensor coeff, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, bool include_basis) -> str");
  m.def(
      "basis_conv2d_plan(Tensor x, Tensor basis, Tensor coeff, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, bool include_basis, Device device) -> (str, Dict(str, str))");
  // How the CPU computes convolutions: "auto", "direct" or "winograd".
  m.def("set_conv_algorithm(str algorithm) -> ()");
  m.def("conv_algorithm() -> str");
  // splitting: splitting matrices of all neurons, S_i = sum_m w[m, i] x_m x_m^T, applied to vectors (Wu et al.).
  // `beta` belongs to the activations "softplus" and "relu".
  def_launched("splitting_weight", "(Tensor grad, Tensor preact, str activation, float? beta) -> Tensor");
  // Linear layers' products in float32 follow torch's setting for matrices, unless full precision is asked for.
  def_launched("splitting_hvp", "(Tensor x, Tensor w, Tensor v, *, bool full_precision=False) -> Tensor");
  def_launched("splitting_hvp_conv2d",
               "(Tensor x, Tensor w, Tensor v, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "splitting_hvp_plan(Tensor x, Tensor w, Tensor v, Device device, *, bool full_precision=False) -> "
      "(str, Dict(str, str))");
  m.def(
      "splitting_hvp_conv2d_plan(Tensor x, Tensor w, Tensor v, int[2] stride, int[2] padding, int[2] dilation, "
      "Device device) -> (str, Dict(str, str))");

  // What the CPU kernels stand on: the instructions that multiply bfloat16 tiles ("amx", "avx512" or "none"), and
  // how fast tiles are multiplied here.
  m.def("bfloat16_tiles() -> str");
  m.def("gemm_ceiling(ScalarType dtype, float milliseconds) -> float");
  // The kernels that have run since the last call of this, by their names in the plans.
  m.def("kernels_ran() -> str[]");
}
