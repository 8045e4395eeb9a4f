// Every op's schema in one place. Implementations register themselves beside their kernels.

#include <torch/library.h>

TORCH_LIBRARY(growkernels, m) {
  m.set_python_module("growkernels.ops");

  // virtual_grad: gradients of layers that do not exist yet (SensLI). `layer` is one of "linear_relu",
  // "residual", "conv2d_relu"; `activation` and `scale` belong to "residual".
  m.def("virtual_grads(Tensor[] inputs, Tensor[] grads, str layer, str activation, float scale) -> Tensor[]");
  m.def("virtual_grad_norms(Tensor[] inputs, Tensor[] grads, str layer, str activation, float scale) -> Tensor");
  m.def(
      "accumulate_virtual_grads(Tensor[] inputs, Tensor[] grads, str layer, str activation, float scale, "
      "Tensor(a!)[] sums, Tensor(b!)? second_moments) -> Tensor");

  // All eigenpairs of small symmetric matrices [n, m, m], of which the lower triangles are read: values
  // [n, m] ascending, vectors [n, m, m] with eigenvector i in row i. Not differentiable.
  m.def("symmetric_eigs(Tensor a) -> (Tensor values, Tensor vectors)");

  // What the CPU kernels stand on: whether oneDNN's tiles can be used, and how fast they go here.
  m.def("brgemm_available(ScalarType dtype) -> bool");
  m.def("gemm_ceiling(ScalarType dtype, float milliseconds) -> float");
}
