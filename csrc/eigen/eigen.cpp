// symmetric_eigs where no kernel of ours runs: shapes without data, other devices, derivatives.

#include "eigen/eigen.h"

#include "common/kernels_ran.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigh.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <tuple>

namespace growkernels::eigen {

void check_matrices(const at::Tensor& a) {
  TORCH_CHECK_VALUE(a.dim() == 3 && a.sym_size(1) == a.sym_size(2), "symmetric_eigs: got shape ", a.sym_sizes(),
                    "; pass square matrices, [n, m, m]");
  TORCH_CHECK_TYPE(a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble, "symmetric_eigs: got dtype ",
                   a.scalar_type(), "; pass float32 or float64");
}

int64_t check_pairs(const at::Tensor& a, std::optional<int64_t> k) {
  if (!k) {
    return a.size(1);
  }
  TORCH_CHECK_VALUE(*k >= 1 && *k <= a.size(1), "symmetric_eigs: got k=", *k, " for matrices of ", a.size(1),
                    " rows; ask for 1 to ", a.size(1), " eigenpairs");
  return *k;
}

std::tuple<at::Tensor, at::Tensor> eigs_by_torch(const at::Tensor& a, std::optional<int64_t> k) {
  check_matrices(a);
  const int64_t pairs = check_pairs(a, k);
  note(Ran::Aten);
  const auto [values, columns] = at::linalg_eigh(a);
  return {values.narrow(1, 0, pairs).contiguous(), columns.mT().narrow(1, 0, pairs).contiguous()};
}

namespace {

std::tuple<at::Tensor, at::Tensor> shapes(const at::Tensor& a, std::optional<int64_t> k) {
  check_matrices(a);
  const c10::SymInt n = a.sym_size(0), m = a.sym_size(1), pairs = k ? c10::SymInt(check_pairs(a, k)) : m;
  return {at::empty_symint({n, pairs}, a.options()), at::empty_symint({n, pairs, m}, a.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, Meta, m) { m.impl("symmetric_eigs", &shapes); }
TORCH_LIBRARY_IMPL(growkernels, CompositeExplicitAutograd, m) { m.impl("symmetric_eigs", &eigs_by_torch); }
TORCH_LIBRARY_IMPL(growkernels, Autograd, m) {
  m.impl("symmetric_eigs", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace growkernels::eigen
