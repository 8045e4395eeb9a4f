"""The ops by themselves, for drivers of your own; each beside what it computes in plain torch.

python examples/raw_ops.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import growkernels as gk


def compare(name: str, ours: Tensor, plain: Tensor) -> float:
    error = float(((ours - plain).norm() / plain.norm()).detach())
    print(f"{name:24} {tuple(ours.shape)!s:16} differs by {error:.1e}")
    return error


def main() -> dict[str, float]:
    torch.manual_seed(0)
    errors = {}

    # 4 trained filters; 6 more outputs are mixed out of theirs. One op, forward and backward.
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    basis, coeff = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(6, 4)
    z = F.conv2d(x, basis, padding=1)
    plain = torch.cat([z, torch.einsum("oc,nchw->nohw", coeff, z)], dim=1)
    ours = gk.basis_conv2d(x, basis, coeff, padding=1)
    errors["basis_conv2d"] = compare("basis_conv2d", ours, plain)
    (gradient,) = torch.autograd.grad(ours.square().sum(), basis, retain_graph=True)
    (expected,) = torch.autograd.grad(plain.square().sum(), basis)
    errors["its gradient"] = compare("its gradient", gradient, expected)

    # The gradient of a layer relu(W h), W = I, that does not exist: from h and dL/dh alone.
    h, grad = torch.randn(64, 8), torch.randn(64, 8)
    (virtual,) = gk.virtual_grads([h], [grad], "linear_relu")
    masked = grad * (h > 0)
    errors["virtual_grads"] = compare("virtual_grads", virtual, masked.t() @ h)
    # Positions of any widths in one call; the norms never write the gradients to memory.
    norms = gk.virtual_grad_norms([h, h[:, :5]], [grad, grad[:, :5]], "linear_relu")
    narrow = (masked[:, :5].t() @ h[:, :5]).square().sum()
    both = torch.stack([virtual.square().sum(), narrow])
    errors["virtual_grad_norms"] = compare("virtual_grad_norms", norms, both)

    # S_i = sum_m w[m, i] x_m x_m^T of every neuron i, applied to a vector each; none is formed.
    rows, preact, upstream = torch.randn(64, 8), torch.randn(64, 10), torch.randn(64, 10)
    w = gk.splitting_weight(upstream, preact, activation="gelu")
    v = torch.randn(10, 8)
    matrices = torch.einsum("mi,ma,mb->iab", w, rows, rows)
    product = torch.einsum("iab,ib->ia", matrices, v)
    errors["splitting_hvp"] = compare("splitting_hvp", gk.splitting_hvp(rows, w, v), product)
    values, vectors, residuals = gk.splitting_eigs(rows, w, k=1, tol=1e-5)
    smallest = torch.linalg.eigvalsh(matrices)[:, :1]
    errors["splitting_eigs"] = compare("splitting_eigs", values, smallest)
    print(f"its vectors: {tuple(vectors.shape)}, largest residual {float(residuals.max()):.1e}")
    return errors


if __name__ == "__main__":
    main()
